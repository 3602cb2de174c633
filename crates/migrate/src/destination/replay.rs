//! Applying chunks that may refer to what is held here: in the guest's RAM, or in a cache of what went by.

use dwcp_hde::{CacheSize, Page, ReplayError, Sink, Span, StreamSink, Unpacked};
use dwcp_proto::{Leg, PageIndex};
use dwcp_vmm::mapped::{MappedError, MappedSink, Pages, Ram};
use tokio::task::spawn_blocking;

use super::chunks::attack;
use crate::error::{Blame, Failure};

/// What one leg's chunks may refer to.
pub(crate) enum Held {
    Stream(StreamSink),
    Mapped(Box<Mapped>),
}

/// A chunk that was replayed: what of it goes to the VMM's socket.
pub(crate) enum Replayed {
    Bytes(Vec<u8>),
    /// A page did not prove itself: what is held here is not what the source thinks. Nothing may go to the VMM.
    Unproved(PageIndex),
}

impl Held {
    /// What `leg` agreed on, if its chunks may refer to anything. The guest's RAM is taken if it is to be written.
    pub(crate) fn of(leg: &Leg, ram: &mut Option<Ram>) -> Result<Option<Self>, Failure> {
        if leg.choice.mapped {
            let ram = ram.take().ok_or_else(|| {
                let text = "the guest's RAM is to be written, and was not offered for this leg";
                Failure::new("protocol", Blame::PeerMisbehaving, text, "compare both agents' versions")
            })?;
            return Ok(Some(Held::Mapped(Box::new(Mapped(MappedSink::new(ram))))));
        }
        let cache = CacheSize::new(leg.choice.cache_pages);
        Ok(cache.map(|size| Held::Stream(StreamSink::new(Some(size)))))
    }

    /// Applies a chunk, off the network's threads.
    pub(crate) async fn replay(mut self, chunk: Unpacked) -> (Option<Self>, Result<Replayed, Failure>) {
        let work = spawn_blocking(move || {
            let replayed = match &mut self {
                Held::Stream(sink) => {
                    let done = chunk.content().replay(sink);
                    outcome(std::mem::take(&mut sink.out), done, |never| match never {})
                }
                Held::Mapped(sink) => {
                    let done = chunk.content().replay(&mut **sink);
                    outcome(sink.0.take(), done, unwritten)
                }
            };
            (Some(self), replayed)
        });
        work.await.unwrap_or_else(|_| {
            let failure =
                Failure::new("apply", Blame::Local, "applying a chunk failed", "please report this");
            (None, Err(failure))
        })
    }
}

fn outcome<E: std::error::Error>(
    bytes: Vec<u8>,
    done: Result<(), ReplayError<E>>,
    failed: impl FnOnce(E) -> Failure,
) -> Result<Replayed, Failure> {
    match done {
        Ok(()) => Ok(Replayed::Bytes(bytes)),
        Err(ReplayError::Proof { index }) => Ok(Replayed::Unproved(index)),
        Err(ReplayError::Unheld { index }) => {
            Err(attack("ref_unheld", &ReplayError::<std::convert::Infallible>::Unheld { index }))
        }
        Err(ReplayError::Sink(error)) => Err(failed(error)),
    }
}

fn unwritten(error: MappedError) -> Failure {
    match error {
        MappedError::Beyond { .. } => attack("oob_page", &error),
        MappedError::Io { ref source, .. } => {
            let text = format!("{error}: {source}");
            Failure::new("ram_unreachable", Blame::Vmm, text, "look whether the VMM is still there")
        }
    }
}

/// The guest's RAM as a sink of HDE.
pub(crate) struct Mapped(MappedSink);

impl Sink for Mapped {
    type Error = MappedError;

    fn opaque(&mut self, bytes: &[u8]) -> Result<(), MappedError> {
        self.0.opaque(bytes);
        Ok(())
    }

    fn pages(&mut self, span: Span<'_>, pages: &[Page]) -> Result<(), MappedError> {
        self.0.pages(place(span), pages)
    }

    fn zeros(&mut self, span: Span<'_>, full: bool) -> Result<(), MappedError> {
        self.0.zeros(place(span), full)
    }

    fn held(&mut self, block: &[u8], index: PageIndex, into: &mut Page) -> Result<bool, MappedError> {
        self.0.held(block, index, into)
    }
}

fn place(span: Span<'_>) -> Pages<'_> {
    Pages { block: span.block, first: span.first, count: span.count, named: span.named }
}
