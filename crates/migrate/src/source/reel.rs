//! What was read from the VMM and is not known to be applied at the destination: both paths send from here, so that either can take
//! over from the other at any offset.

use std::collections::VecDeque;

use bytes::Bytes;
use dwcp_proto::{Segment, StreamOffset};
use tokio::sync::mpsc;

/// Bounded by whoever takes from it: a segment is read from the VMM only when it is asked for.
///
/// ```text
///   applied        handed            end
///  ───┼───────────────┼────────────────┼──▶ the VMM's stream
///     │ may be lost   │ kept again     │ not read yet
///       on the way      after a rewind
/// ```
pub(crate) struct Reel {
    segments: mpsc::Receiver<Segment>,
    /// From `applied` on, without gaps. The first may be the rest of a segment.
    kept: VecDeque<Segment>,
    /// How many of the kept ones were handed out on this leg.
    handed: usize,
    applied: u64,
    end: u64,
    ended: bool,
}

impl Reel {
    pub(crate) fn new(segments: mpsc::Receiver<Segment>) -> Self {
        Reel { segments, kept: VecDeque::new(), handed: 0, applied: 0, end: 0, ended: false }
    }

    /// The next segment to send on this leg, `None` at the end of the stream. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Segment> {
        if self.handed == self.kept.len() {
            if self.ended {
                return None;
            }
            let Some(segment) = self.segments.recv().await else {
                self.ended = true;
                return None;
            };
            self.end = segment.end().0;
            self.kept.push_back(segment);
        }
        let segment = self.kept.get(self.handed).cloned();
        self.handed += 1;
        segment
    }

    /// All before `offset` was applied; `seen` is shown what falls away. What is older changes nothing.
    ///
    /// # Errors
    /// So much was never read: the peer's word cannot be true.
    pub(crate) fn trim(&mut self, offset: u64, mut seen: impl FnMut(&[u8])) -> Result<(), BeyondEnd> {
        if offset > self.end {
            return Err(BeyondEnd { offset, end: self.end });
        }
        while self.applied < offset {
            let Some(first) = self.kept.front_mut() else { break };
            let part = ((offset - self.applied) as usize).min(first.bytes.len());
            seen(&first.bytes[..part]);
            self.applied += part as u64;
            if part == first.bytes.len() {
                self.kept.pop_front();
                self.handed = self.handed.saturating_sub(1);
            } else {
                // Which pages the rest belongs to is told by what fell away: it travels as it is.
                let rest = first.bytes.slice(part..);
                *first = Segment::opaque(StreamOffset(self.applied), rest, first.version);
            }
        }
        Ok(())
    }

    /// A new leg begins at what was applied last: all that is kept is handed out again.
    pub(crate) fn rewind(&mut self) {
        self.handed = 0;
    }

    /// The kept bytes from `offset` on, up to the end of the segment that holds them; `None` if nothing was handed out there.
    pub(crate) fn bytes_from(&self, offset: u64) -> Option<Bytes> {
        let segment = self.kept.iter().take(self.handed).find(|segment| segment.end().0 > offset)?;
        let skip = offset.checked_sub(segment.offset.0)?;
        Some(segment.bytes.slice(skip as usize..))
    }

    /// Up to where all was applied.
    pub(crate) fn applied(&self) -> u64 {
        self.applied
    }

    /// Up to where segments were handed out on this leg.
    pub(crate) fn handed(&self) -> u64 {
        let last = self.handed.checked_sub(1).and_then(|last| self.kept.get(last));
        last.map_or(self.applied, |segment| segment.end().0)
    }

    /// The stream's length, once its end was read and handed out.
    pub(crate) fn length(&self) -> Option<u64> {
        (self.ended && self.handed == self.kept.len()).then_some(self.end)
    }
}

/// An offset that the VMM's stream has not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer acknowledged byte {offset} of {end}")]
pub(crate) struct BeyondEnd {
    offset: u64,
    end: u64,
}

#[cfg(test)]
mod tests {
    use dwcp_proto::PageVersion;

    use super::*;

    fn reel(lengths: &[usize]) -> Reel {
        let (sender, segments) = mpsc::channel(lengths.len());
        let mut offset = 0;
        for (n, &len) in lengths.iter().enumerate() {
            let bytes = Bytes::from(vec![n as u8; len]);
            sender.try_send(Segment::opaque(StreamOffset(offset), bytes, PageVersion(0))).unwrap();
            offset += len as u64;
        }
        Reel::new(segments)
    }

    async fn rest(reel: &mut Reel) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(segment) = reel.next().await {
            assert_eq!(segment.records.len(), 1);
            all.extend_from_slice(&segment.bytes);
        }
        all
    }

    #[tokio::test]
    async fn what_was_not_applied_is_handed_out_again_to_the_byte() {
        let mut reel = reel(&[3, 4, 5]);
        reel.next().await.unwrap();
        reel.next().await.unwrap();
        assert_eq!((reel.handed(), reel.length()), (7, None));
        let mut seen = Vec::new();
        reel.trim(5, |bytes| seen.extend_from_slice(bytes)).unwrap();
        assert_eq!((seen, reel.applied()), (vec![0, 0, 0, 1, 1], 5));
        assert_eq!(reel.trim(8, |_| {}), Err(BeyondEnd { offset: 8, end: 7 }));
        reel.trim(2, |_| panic!("older words change nothing")).unwrap();
        reel.rewind();
        assert_eq!(reel.handed(), 5);
        assert_eq!(rest(&mut reel).await, [1, 1, 2, 2, 2, 2, 2]);
        assert_eq!((reel.handed(), reel.length()), (12, Some(12)));
        reel.rewind();
        assert_eq!(reel.length(), None, "not handed out on this leg");
        assert_eq!(rest(&mut reel).await.len(), 7);
        reel.trim(12, |_| {}).unwrap();
        assert_eq!((reel.applied(), reel.length()), (12, Some(12)));
    }

    #[tokio::test]
    async fn bytes_are_found_by_their_offset() {
        let mut reel = reel(&[3, 4]);
        assert_eq!(reel.bytes_from(0), None, "nothing was handed out");
        reel.next().await.unwrap();
        assert_eq!(reel.bytes_from(1).unwrap(), [0u8, 0][..]);
        assert_eq!(reel.bytes_from(3), None);
        reel.next().await.unwrap();
        assert_eq!(reel.bytes_from(3).unwrap(), [1u8; 4][..]);
        reel.trim(4, |_| {}).unwrap();
        assert_eq!(reel.bytes_from(5).unwrap(), [1u8, 1][..]);
        assert_eq!(reel.bytes_from(7), None);
    }
}
