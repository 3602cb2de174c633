use bytes::Bytes;
use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO};
use dwcp_proto::{BlockNames, PageIndex, PageVersion, RamBlockId, Record, Run, Segment, StreamOffset};

/// Writes a stretch of stream and its index, as a source that cuts QEMU's stream would give it.
#[derive(Debug, Default)]
pub struct SegmentBuilder {
    bytes: Vec<u8>,
    records: Vec<Record>,
    names: BlockNames,
    last: Option<RamBlockId>,
}

impl SegmentBuilder {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty one of a stream that has mentioned these blocks: in the segments of one stream a block has one id.
    pub fn naming(blocks: &[&[u8]]) -> Self {
        let mut builder = Self::default();
        for block in blocks {
            builder.names.intern(block);
        }
        builder
    }

    /// The stream before this segment ended within `block`: its next record has the CONTINUE flag.
    pub fn continuing(mut self, block: &[u8]) -> Self {
        self.last = self.names.intern(block);
        self
    }

    /// Adds bytes that are no page.
    pub fn opaque(&mut self, bytes: &[u8]) -> &mut Self {
        if !bytes.is_empty() {
            self.bytes.extend_from_slice(bytes);
            self.records.push(Record::Opaque { len: bytes.len() as u32 });
        }
        self
    }

    /// Adds a full-page record.
    pub fn page(&mut self, block: &[u8], index: u64, page: &[u8; PAGE_SIZE]) -> &mut Self {
        self.record(block, index, FLAG_PAGE, page)
    }

    /// Adds a zero-page record.
    pub fn zero(&mut self, block: &[u8], index: u64) -> &mut Self {
        self.record(block, index, FLAG_ZERO, &[0])
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The segment, at `offset` of the stream.
    pub fn finish(self, offset: u64) -> Segment {
        Segment {
            offset: StreamOffset(offset),
            bytes: Bytes::from(self.bytes),
            records: self.records,
            names: self.names,
            version: PageVersion(0),
        }
    }

    fn record(&mut self, block: &[u8], index: u64, flag: u64, body: &[u8]) -> &mut Self {
        let id = self.names.intern(block).unwrap_or_default();
        let continued = self.last == Some(id);
        let modifier = if continued { FLAG_CONTINUE } else { 0 };
        self.bytes.extend_from_slice(&((index * PAGE_SIZE as u64) | flag | modifier).to_be_bytes());
        if !continued {
            self.bytes.push(block.len() as u8);
            self.bytes.extend_from_slice(block);
        }
        self.bytes.extend_from_slice(body);
        self.last = Some(id);
        let run = match self.records.last_mut() {
            Some(Record::Pages(run)) if flag == FLAG_PAGE => Some(run),
            Some(Record::Zeros(run)) if flag == FLAG_ZERO => Some(run),
            _ => None,
        };
        if let Some(run) = run
            && continued
            && run.first.0 + u64::from(run.count) == index
        {
            run.count += 1;
            return self;
        }
        let run = Run { block: id, first: PageIndex(index), count: 1, continued };
        self.records.push(if flag == FLAG_PAGE { Record::Pages(run) } else { Record::Zeros(run) });
        self
    }
}
