//! Records back into the bytes of a stream, and a view of a segment piece by piece.

use dwcp_proto::limits::{MAX_SEGMENT_BYTES, MAX_SEGMENT_RECORDS, PAGE_SIZE};
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO, RECORD_WORD};
use dwcp_proto::{BlockNames, PageIndex, RamBlockId, Record, Run, Segment};

/// Records and content that do not fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SerialiseError {
    /// A record of a block that the table does not name.
    #[error("record of RAM block {0}, which is not in the table of names")]
    UnknownBlock(RamBlockId),
    /// A page index whose byte offset is past the number space.
    #[error("page {0} is out of range")]
    PageRange(PageIndex),
    /// Less or more content than the records ask for.
    #[error("the records ask for another length of content than there is")]
    Content,
    /// Beyond a limit of a segment.
    #[error("the records exceed the limits of a segment")]
    TooLong,
}

/// The stream's bytes, rebuilt from records and their `content`: the opaque bytes and full pages in the order of
/// the records. Zero pages have no content.
///
/// It is the inverse of what [`Cutter`](super::Cutter) does: for each of its segments
/// `serialise(&s.records, &s.names, &content(&s)?)` equals `s.bytes`.
pub fn serialise(records: &[Record], names: &BlockNames, content: &[u8]) -> Result<Vec<u8>, SerialiseError> {
    let mut out = Vec::with_capacity(stream_len(records, names)?);
    let mut content = content;
    for record in records {
        match *record {
            Record::Opaque { len } => out.extend_from_slice(split(&mut content, len as usize)?),
            Record::Pages(run) => run_words(&mut out, run, names, FLAG_PAGE, |out| {
                out.extend_from_slice(split(&mut content, PAGE_SIZE)?);
                Ok(())
            })?,
            Record::Zeros(run) => run_words(&mut out, run, names, FLAG_ZERO, |out| {
                out.push(0);
                Ok(())
            })?,
        }
    }
    if content.is_empty() { Ok(out) } else { Err(SerialiseError::Content) }
}

/// The content of a segment's records, as [`serialise`] takes it.
pub fn content(segment: &Segment) -> Result<Vec<u8>, SerialiseError> {
    let mut content = Vec::with_capacity(segment.bytes.len());
    for piece in pieces(segment) {
        match piece? {
            Piece::Opaque(bytes) | Piece::Page { bytes, .. } => content.extend_from_slice(bytes),
            Piece::Zero { .. } => {}
        }
    }
    Ok(content)
}

/// One page or opaque stretch of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Bytes that are not a page.
    Opaque(&'a [u8]),
    /// A page.
    Page {
        /// Its block.
        block: RamBlockId,
        /// Where in the block.
        index: PageIndex,
        /// Whether its record carries the block's name.
        named: bool,
        /// Its [`PAGE_SIZE`] bytes.
        bytes: &'a [u8],
    },
    /// A page of zeros.
    Zero {
        /// Its block.
        block: RamBlockId,
        /// Where in the block.
        index: PageIndex,
        /// Whether its record carries the block's name.
        named: bool,
    },
}

/// A segment's pieces in order. A segment whose records do not match its bytes gives an error and ends there.
pub fn pieces(segment: &Segment) -> impl Iterator<Item = Result<Piece<'_>, SerialiseError>> {
    let mut rest = &segment.bytes[..];
    let mut records = segment.records.iter();
    let mut current: Option<(Run, bool)> = None;
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed {
            return None;
        }
        let piece = loop {
            match &mut current {
                Some((run, _)) if run.count == 0 => current = None,
                Some((run, full)) => break next_page(&mut rest, run, *full, &segment.names),
                None => match records.next() {
                    Some(Record::Opaque { len }) => break split(&mut rest, *len as usize).map(Piece::Opaque),
                    Some(Record::Pages(run)) => current = Some((*run, true)),
                    Some(Record::Zeros(run)) => current = Some((*run, false)),
                    None if rest.is_empty() => return None,
                    None => break Err(SerialiseError::Content),
                },
            }
        };
        failed = piece.is_err();
        Some(piece)
    })
}

/// Splits the front page off a run.
fn next_page<'a>(
    rest: &mut &'a [u8],
    run: &mut Run,
    full: bool,
    names: &BlockNames,
) -> Result<Piece<'a>, SerialiseError> {
    let named = !run.continued;
    let name = if named { 1 + name(names, run.block)?.len() } else { 0 };
    split(rest, RECORD_WORD + name)?;
    let bytes = split(rest, if full { PAGE_SIZE } else { 1 })?;
    let (block, index) = (run.block, run.first);
    run.first = PageIndex(index.0.checked_add(1).ok_or(SerialiseError::PageRange(index))?);
    run.continued = true;
    run.count -= 1;
    Ok(if full { Piece::Page { block, index, named, bytes } } else { Piece::Zero { block, index, named } })
}

/// Bytes that the records take in the stream, within the limits of a segment.
fn stream_len(records: &[Record], names: &BlockNames) -> Result<usize, SerialiseError> {
    let mut count = 0;
    let mut bytes: usize = 0;
    for record in records {
        let entries = match record {
            Record::Opaque { .. } => 1,
            Record::Pages(run) | Record::Zeros(run) => run.count as usize,
        };
        if entries > MAX_SEGMENT_RECORDS {
            return Err(SerialiseError::TooLong);
        }
        count += entries;
        bytes = bytes.checked_add(record.stream_len(names)).ok_or(SerialiseError::TooLong)?;
        if count > MAX_SEGMENT_RECORDS || bytes > MAX_SEGMENT_BYTES {
            return Err(SerialiseError::TooLong);
        }
    }
    Ok(bytes)
}

fn run_words(
    out: &mut Vec<u8>,
    run: Run,
    names: &BlockNames,
    flag: u64,
    mut body: impl FnMut(&mut Vec<u8>) -> Result<(), SerialiseError>,
) -> Result<(), SerialiseError> {
    for i in 0..u64::from(run.count) {
        let index = run.first.0.checked_add(i);
        let offset = index.and_then(|index| index.checked_mul(PAGE_SIZE as u64));
        let offset = offset.ok_or(SerialiseError::PageRange(run.first))?;
        let continued = run.continued || i > 0;
        out.extend_from_slice(&(offset | flag | if continued { FLAG_CONTINUE } else { 0 }).to_be_bytes());
        if !continued {
            let name = name(names, run.block)?;
            let len = u8::try_from(name.len()).map_err(|_| SerialiseError::UnknownBlock(run.block))?;
            out.push(len);
            out.extend_from_slice(name);
        }
        body(out)?;
    }
    Ok(())
}

fn name(names: &BlockNames, block: RamBlockId) -> Result<&[u8], SerialiseError> {
    names.name(block).ok_or(SerialiseError::UnknownBlock(block))
}

fn split<'a>(bytes: &mut &'a [u8], len: usize) -> Result<&'a [u8], SerialiseError> {
    let (front, rest) = bytes.split_at_checked(len).ok_or(SerialiseError::Content)?;
    *bytes = rest;
    Ok(front)
}
