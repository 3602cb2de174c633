//! What a destination writes down so that its next life can go on with receiving: where its connection to the VMM is, and what both
//! sides offered.
//!
//! It is a note, not a decision: without it, or where it no longer fits, the migration is taken back as ever.

use dwcp_link::ever_written;
use dwcp_proto::journal::{Entry, Note};
use dwcp_proto::message::Offer;
use dwcp_vmm::kept::Mark;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsFd;
use tokio::net::TcpStream;

use super::land::Sink;
use crate::guest::Guest;
use crate::handshake::Offers;

/// The note's name.
pub(crate) const KEPT: &str = "kept";

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Kept {
    #[serde(flatten)]
    mark: Mark,
    /// What the kernel had counted before the first byte.
    base: u64,
    /// The source's offer, encoded, in hexadecimal digits.
    source: String,
    /// The destination's.
    destination: String,
}

impl Kept {
    /// Of a connection that nothing was written to yet.
    pub(crate) fn new(stream: &TcpStream, mark: Mark, offers: &Offers) -> io::Result<Self> {
        let encode = |offer: &Offer| {
            // Words decide nothing, and a note has little room.
            let offer = Offer { v3_reason: String::new(), unmapped: String::new(), ..offer.clone() };
            offer.encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect()
        };
        let base = ever_written(stream.as_fd())?;
        Ok(Kept { mark, base, source: encode(&offers.source), destination: encode(&offers.destination) })
    }

    /// As a note's text.
    pub(crate) fn to_text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The newest of a journal.
    pub(crate) fn find<'a>(entries: impl DoubleEndedIterator<Item = &'a Entry>) -> Option<Self> {
        let mut notes = entries.rev().filter_map(|entry| match entry {
            Entry::Note(Note { what, text, .. }) if what == KEPT => Some(text),
            _ => None,
        });
        serde_json::from_str(notes.next()?).ok()
    }

    /// The connection, and how much of the stream the VMM was given over it.
    pub(crate) fn take_up(&self, guest: &Guest) -> io::Result<Sink> {
        let stream = guest.kept(self.mark)?;
        let written = ever_written(stream.as_fd())?;
        let applied =
            written.checked_sub(self.base).ok_or_else(|| io::Error::other("the count went back"))?;
        Ok(Sink::kept(stream, applied))
    }

    /// What both sides offered.
    pub(crate) fn offers(&self) -> Option<Offers> {
        let decode = |digits: &str| {
            let bytes: Option<Vec<u8>> = (0..digits.len() / 2)
                .map(|i| u8::from_str_radix(digits.get(2 * i..2 * i + 2)?, 16).ok())
                .collect();
            Offer::decode(bytes?.as_slice()).ok()
        };
        Some(Offers { source: decode(&self.source)?, destination: decode(&self.destination)? })
    }
}
