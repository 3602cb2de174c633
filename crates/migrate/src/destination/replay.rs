//! Applying chunks that may refer to what is held here: in the guest's RAM, or in a cache of what went by.

use bytes::Bytes;
use dwcp_hde::{
    CacheSize, Content, DecodeError, LaneDecoder, LaneError, LaneWindow, Page, ReplayError, Sink, Span,
    StreamSink,
};
use dwcp_proto::{Leg, Mode, PageIndex, VerifiedChunk};
use dwcp_vmm::mapped::{MappedError, MappedSink, Pages, Ram, Splitter};
use dwcp_vmm::stream::OpaqueReason;
use tokio::task::spawn_blocking;
use tracing::warn;

use super::chunks::{Ready, attack};
use crate::error::{Blame, Failure};

/// What one leg's chunks may refer to, and the lane that they may continue.
pub(crate) enum Held {
    Stream(StreamSink, Option<LaneDecoder>),
    Mapped(Box<Mapped>, Option<LaneDecoder>),
    /// Nothing: chunks hold the VMM's stream as it is, whose pages are written to the guest's RAM.
    Split(Box<Splitter>),
}

/// A chunk that was replayed: what of it goes to the VMM's socket.
pub(crate) enum Replayed {
    Bytes(Bytes),
    /// A page did not prove itself: what is held here is not what the source thinks. Nothing may go to the VMM.
    Unproved(PageIndex),
}

impl Held {
    /// What `leg` agreed on, if its chunks may refer to anything. The guest's RAM is taken if it is to be written.
    pub(crate) fn of(leg: &Leg, ram: &mut Option<Ram>) -> Result<Option<Self>, Failure> {
        let lane = LaneWindow::new(leg.choice.lane_window).map(LaneDecoder::new);
        if leg.choice.mapped {
            let ram = ram.take().ok_or_else(|| {
                let text = "the guest's RAM is to be written, and was not offered for this leg";
                Failure::new("protocol", Blame::PeerMisbehaving, text, "compare both agents' versions")
            })?;
            return Ok(Some(match leg.mode {
                Mode::Internet => Held::Mapped(Box::new(Mapped(MappedSink::new(ram))), lane),
                Mode::Datacenter => Held::Split(Box::new(Splitter::new(ram))),
            }));
        }
        let cache = CacheSize::new(leg.choice.cache_pages);
        Ok(cache.map(|size| Held::Stream(StreamSink::new(Some(size)), lane)))
    }

    /// Whether chunks may refer to what is held.
    pub(crate) fn refers(&self) -> bool {
        !matches!(self, Held::Split(_))
    }

    /// Applies chunks in this order, off the network's threads; it ends after the first that does not prove itself.
    pub(crate) async fn replay(
        mut self,
        chunks: Vec<Ready>,
    ) -> (Option<Self>, Result<Vec<Replayed>, Failure>) {
        let work = spawn_blocking(move || {
            let mut all = Vec::with_capacity(chunks.len());
            for chunk in chunks {
                match self.replay_now(chunk) {
                    Ok(replayed) => {
                        let goes_on = matches!(replayed, Replayed::Bytes(_));
                        all.push(replayed);
                        if !goes_on {
                            break;
                        }
                    }
                    Err(failure) => return (Some(self), Err(failure)),
                }
            }
            (Some(self), Ok(all))
        });
        work.await.unwrap_or_else(|_| (None, Err(failed())))
    }

    fn replay_now(&mut self, chunk: Ready) -> Result<Replayed, Failure> {
        match (self, chunk) {
            (Held::Stream(sink, _), Ready::Unpacked(chunk)) => {
                let done = chunk.content().replay(sink);
                outcome(std::mem::take(&mut sink.out), done, |never| match never {})
            }
            (Held::Stream(sink, lane), Ready::InLane(chunk)) => {
                let done = open(lane, &chunk)?.replay(sink);
                outcome(std::mem::take(&mut sink.out), done, |never| match never {})
            }
            (Held::Mapped(sink, _), Ready::Unpacked(chunk)) => {
                let done = chunk.content().replay(&mut **sink);
                outcome(sink.0.take(), done, unwritten)
            }
            (Held::Mapped(sink, lane), Ready::InLane(chunk)) => {
                let done = open(lane, &chunk)?.replay(&mut **sink);
                outcome(sink.0.take(), done, unwritten)
            }
            (Held::Split(splitter), Ready::Stream(stream)) => split(splitter, &stream),
            // The end of the stream, or what refers to nothing.
            (_, chunk) => unheld(chunk),
        }
    }
}

/// Applies a chunk where nothing is held.
pub(crate) fn unheld(chunk: Ready) -> Result<Replayed, Failure> {
    match chunk {
        Ready::Stream(stream) => Ok(Replayed::Bytes(stream)),
        // Chunks are unpacked, or left to a lane, only where they may refer to something.
        Ready::Unpacked(_) | Ready::InLane(_) => Err(failed()),
    }
}

/// Opens the next chunk of the lane. Its signature was right: whatever is wrong with it is its sender's doing.
fn open<'a>(lane: &'a mut Option<LaneDecoder>, chunk: &VerifiedChunk) -> Result<Content<'a>, Failure> {
    let opened = match lane {
        Some(lane) => lane.open(chunk),
        None => Err(DecodeError::from(LaneError::None)),
    };
    opened.map_err(|error| attack("malformed_chunk", &error))
}

fn failed() -> Failure {
    Failure::new("apply", Blame::Local, "applying a chunk failed", "please report this")
}

fn split(splitter: &mut Splitter, stream: &[u8]) -> Result<Replayed, Failure> {
    let understood = splitter.opaque_reason().is_none();
    splitter.apply(stream).map_err(unwritten)?;
    // The source has the same words for its status.
    if let Some(reason) = splitter.opaque_reason().filter(|r| understood && *r != OpaqueReason::DeviceState) {
        warn!(%reason, "the rest of the VMM's stream goes to its socket, pages included");
    }
    Ok(Replayed::Bytes(splitter.take().into()))
}

fn outcome<E: std::error::Error>(
    bytes: Vec<u8>,
    done: Result<(), ReplayError<E>>,
    failed: impl FnOnce(E) -> Failure,
) -> Result<Replayed, Failure> {
    match done {
        Ok(()) => Ok(Replayed::Bytes(bytes.into())),
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
