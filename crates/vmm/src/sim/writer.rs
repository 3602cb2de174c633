//! Writes QEMU's migration stream, item by item.

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO};

/// Section id that this writer gives to RAM.
const RAM_SECTION: u32 = 2;
/// Section id of the device state.
const DEVICE_SECTION: u32 = 3;

/// Appends items of QEMU's migration stream to bytes. It writes what it is told to, in whatever order, so tests may
/// write nonsense, too.
#[derive(Debug, Clone, Default)]
pub struct StreamWriter {
    out: Vec<u8>,
    last_block: Option<Vec<u8>>,
}

impl StreamWriter {
    /// A writer that has written nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes out what was written since the last call.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// What was written since the last [`take`](Self::take).
    pub fn bytes(&self) -> &[u8] {
        &self.out
    }

    /// Any bytes.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Magic and version.
    pub fn header(&mut self) {
        self.raw(b"QEVM");
        self.u32(3);
    }

    /// The configuration section with the machine type's name.
    pub fn configuration(&mut self, machine: &str) {
        self.out.push(0x07);
        self.u32(machine.len() as u32);
        self.raw(machine.as_bytes());
    }

    /// A subsection of the configuration.
    pub fn subsection(&mut self, name: &str, body: &[u8]) {
        self.out.push(0x05);
        self.name(name.as_bytes());
        self.u32(1);
        self.raw(body);
    }

    /// A command.
    pub fn command(&mut self, command: u16, data: &[u8]) {
        self.out.push(0x08);
        self.raw(&command.to_be_bytes());
        self.raw(&(data.len() as u16).to_be_bytes());
        self.raw(data);
    }

    /// RAM's START section: the blocks' names and lengths, in the order of their ids.
    pub fn ram_start<'a>(&mut self, blocks: impl Iterator<Item = (&'a [u8], u64)> + Clone) {
        self.out.push(0x01);
        self.u32(RAM_SECTION);
        self.name(b"ram");
        self.u32(0);
        self.u32(4);
        self.u64(blocks.clone().map(|(_, used)| used).sum::<u64>() | 0x04);
        for (name, used) in blocks {
            self.name(name);
            self.u64(used);
        }
        self.section_end();
    }

    /// Begins a PART of RAM, or its END.
    pub fn ram_part(&mut self, end: bool) {
        self.out.push(if end { 0x03 } else { 0x02 });
        self.u32(RAM_SECTION);
    }

    /// EOS and footer.
    pub fn section_end(&mut self) {
        self.u64(0x10);
        self.out.push(0x7e);
        self.u32(RAM_SECTION);
    }

    /// MULTIFD_FLUSH.
    pub fn flush_record(&mut self) {
        self.u64(0x200);
    }

    /// A page; all zeros become a zero record. The block's name is left out where the record before was of the
    /// same block.
    pub fn page(&mut self, block: &[u8], index: u64, page: &[u8]) {
        let zero = page == [0; PAGE_SIZE];
        let continued = self.last_block.as_deref() == Some(block);
        let flags = if zero { FLAG_ZERO } else { FLAG_PAGE } | if continued { FLAG_CONTINUE } else { 0 };
        self.u64((index * PAGE_SIZE as u64) | flags);
        if !continued {
            self.name(block);
            self.last_block = Some(block.to_vec());
        }
        if zero { self.out.push(0) } else { self.raw(page) }
    }

    /// Lets the next page name its block.
    pub fn forget_block(&mut self) {
        self.last_block = None;
    }

    /// A FULL section of a device.
    pub fn device(&mut self, name: &str, state: &[u8]) {
        self.out.push(0x04);
        self.u32(DEVICE_SECTION);
        self.name(name.as_bytes());
        self.u32(0);
        self.u32(1);
        self.raw(state);
        self.out.push(0x7e);
        self.u32(DEVICE_SECTION);
    }

    /// EOF and the description that follows it.
    pub fn eof(&mut self, description: &str) {
        self.out.push(0x00);
        self.out.push(0x06);
        self.u32(description.len() as u32);
        self.raw(description.as_bytes());
    }

    fn name(&mut self, name: &[u8]) {
        self.out.push(name.len() as u8);
        self.raw(name);
    }

    fn u32(&mut self, value: u32) {
        self.raw(&value.to_be_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.raw(&value.to_be_bytes());
    }
}
