//! The grammar of QEMU's main migration channel, one item at a time.
//!
//! Source of the format: QEMU's `migration/savevm.c`, `migration/ram.c` and `docs/devel/migration`, releases 7.2 to
//! 11.1. All integers are big-endian.
//!
//! ```text
//! stream   = "QEVM" u32(3) [configuration] { command | section } device-state
//! section  = START u32(id) name u32(instance) u32(version) { record } EOS [footer]     only "ram", version 4
//!          | (PART | END) u32(id) { record } EOS [footer]
//! record   = u64(offset | flags) [name] body
//! ```
//!
//! Device sections carry no length, so the first one ends what can be understood: everything from there on is
//! [opaque](OpaqueReason). That is the rule for everything else that is not in the grammar, too.

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO, RECORD_WORD};
use dwcp_proto::{PageIndex, RamBlockId};

use super::layout::Layout;

/// Bytes that any item of the grammar takes at most: a page record with the longest name.
pub(crate) const MAX_ITEM: usize = RECORD_WORD + 1 + 255 + PAGE_SIZE;

const MAGIC: u32 = 0x5145_564d;
const STREAM_VERSION: u32 = 3;
const RAM_VERSION: u32 = 4;
/// Bytes of a machine type's name.
const MAX_MACHINE: usize = 255;
/// Capabilities that a configuration may list: QEMU has some two dozen.
const MAX_CAPABILITIES: u32 = 64;

const FLAG_MEM_SIZE: u64 = 0x04;
pub(crate) const FLAG_EOS: u64 = 0x10;
const FLAG_XBZRLE: u64 = 0x40;
const FLAG_HOOK: u64 = 0x80;
const FLAG_COMPRESS: u64 = 0x100;
pub(crate) const FLAG_MULTIFD_FLUSH: u64 = 0x200;
const FLAGS: u64 = PAGE_SIZE as u64 - 1;

const SECTION_EOF: u8 = 0x00;
pub(crate) const SECTION_START: u8 = 0x01;
pub(crate) const SECTION_PART: u8 = 0x02;
const SECTION_END: u8 = 0x03;
const SECTION_FULL: u8 = 0x04;
const SECTION_SUBSECTION: u8 = 0x05;
const SECTION_CONFIGURATION: u8 = 0x07;
const SECTION_COMMAND: u8 = 0x08;
pub(crate) const SECTION_FOOTER: u8 = 0x7e;

/// Why the rest of a stream is passed on without being understood. Each is lossless; only the savings end there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum OpaqueReason {
    /// The expected end of what can be understood: all RAM was sent.
    #[error("device state follows")]
    DeviceState,
    /// Not the main channel of a QEMU stream.
    #[error("the stream does not begin with QEMU's magic and version 3")]
    NotQemu,
    /// A multifd channel.
    #[error("this is a multifd channel")]
    Multifd,
    /// A section that saves something else than RAM in rounds.
    #[error("a section that is not \"ram\" in version 4")]
    ForeignSection,
    /// A section kind, id or order outside the grammar.
    #[error("unexpected section byte {0:#04x}")]
    UnknownSection(u8),
    /// A configuration that the parser cannot step over.
    #[error("unknown configuration")]
    UnknownConfiguration,
    /// A capability that lays RAM out in another way.
    #[error("a capability changes how RAM is laid out")]
    Capability,
    /// The guest's page size is not 4 KiB.
    #[error("the guest's page size is not 4 KiB")]
    PageSize,
    /// A command outside the grammar, postcopy's among them.
    #[error("unknown command {0}")]
    UnknownCommand(u16),
    /// XBZRLE pages.
    #[error("XBZRLE is on")]
    Xbzrle,
    /// Pages that QEMU compressed.
    #[error("QEMU compresses pages itself")]
    Compressed,
    /// RDMA.
    #[error("RDMA hooks")]
    Hook,
    /// A record with flags outside the grammar.
    #[error("unknown RAM record flags {0:#x}")]
    UnknownFlags(u16),
    /// A zero record that fills with something else.
    #[error("a page filled with {0:#04x}")]
    Fill(u8),
    /// A page of a block that the list did not name.
    #[error("a page of an unknown RAM block")]
    UnknownBlock,
    /// A page beyond the used length of its block.
    #[error("a page beyond its RAM block")]
    BeyondBlock,
    /// A block list that contradicts itself or is too long.
    #[error("bad RAM block list")]
    BlockList,
    /// More rounds than a page version can count.
    #[error("too many rounds")]
    TooManyRounds,
    /// The stream ended within an item.
    #[error("the stream ended within an item")]
    Truncated,
}

/// A page, or zeros, of a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageItem {
    pub(crate) block: RamBlockId,
    pub(crate) index: PageIndex,
    pub(crate) continued: bool,
    pub(crate) zero: bool,
}

/// What one step understood.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Item {
    /// Header, configuration, commands, lists.
    Framing,
    /// The head of a RAM section; of the last one, or not.
    Section { last: bool },
    /// MULTIFD_FLUSH.
    Flush,
    /// The end of a RAM section's records.
    Eos,
    /// The footer of a RAM section.
    Footer,
    /// A page. All that is none is passed on as it is.
    Page(PageItem),
}

/// Result of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    /// An item of this many bytes.
    Item(usize, Item),
    /// The item is not whole yet.
    NeedMore,
    /// From here on nothing is understood.
    Opaque(OpaqueReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// At the very start.
    Header,
    /// After the header: a configuration may come.
    Configuration,
    /// Within the configuration: subsections may come.
    Subsections,
    /// Between sections.
    Between,
    /// After a section of this id: its footer may come.
    Footer(u32),
    /// Within a RAM section of this id.
    Records(u32),
    /// Within the list of RAM blocks; so many bytes of RAM are still to be named. `first` until one was.
    Blocks { section: u32, left: u64, first: bool },
}

/// Where the parser stands in the grammar, and what it learnt on the way.
#[derive(Debug)]
pub(crate) struct Parser {
    state: State,
    pub(crate) layout: Layout,
    pub(super) machine: Option<Box<[u8]>>,
    ram: Option<u32>,
    last_block: Option<RamBlockId>,
    ignore_shared: bool,
    postcopy: bool,
}

impl Parser {
    pub(crate) fn new() -> Self {
        Parser {
            state: State::Header,
            layout: Layout::default(),
            machine: None,
            ram: None,
            last_block: None,
            ignore_shared: false,
            postcopy: false,
        }
    }

    /// Whether the list of RAM blocks was read to its end.
    pub(super) fn in_ram(&self) -> bool {
        let in_list = matches!(self.state, State::Blocks { left: 1.., .. });
        !self.layout.blocks().is_empty() && !in_list
    }

    /// The id of RAM's sections, once one began.
    pub(crate) fn ram_section(&self) -> Option<u32> {
        self.ram
    }

    /// Understands the item at the start of `bytes`, which may be short. An item is counted once: on
    /// [`Step::Item`] the caller goes on behind it.
    pub(crate) fn step(&mut self, bytes: &[u8]) -> Step {
        let mut cursor = Cursor { bytes, at: 0 };
        let parsed = match self.state {
            State::Records(section) => self.record(&mut cursor, section),
            State::Blocks { section, left, first } => self.block(&mut cursor, section, left, first),
            State::Header => self.header(&mut cursor),
            State::Configuration | State::Subsections | State::Between | State::Footer(_) => {
                self.section(&mut cursor)
            }
        };
        match parsed {
            Ok(item) => Step::Item(cursor.at, item),
            Err(Stop::NeedMore) => Step::NeedMore,
            Err(Stop::Opaque(reason)) => Step::Opaque(reason),
        }
    }

    fn record(&mut self, cursor: &mut Cursor<'_>, section: u32) -> Parsed {
        let word = cursor.u64()?;
        let flags = word & FLAGS;
        match flags & !FLAG_CONTINUE {
            FLAG_PAGE | FLAG_ZERO => {}
            FLAG_EOS if flags == FLAG_EOS => {
                self.state = State::Footer(section);
                return Ok(Item::Eos);
            }
            FLAG_MULTIFD_FLUSH if flags == FLAG_MULTIFD_FLUSH => return Ok(Item::Flush),
            FLAG_MEM_SIZE if flags == FLAG_MEM_SIZE => {
                if !self.layout.blocks().is_empty() || word & !FLAGS == 0 {
                    return opaque(OpaqueReason::BlockList);
                }
                self.state = State::Blocks { section, left: word & !FLAGS, first: true };
                return Ok(Item::Framing);
            }
            FLAG_XBZRLE => return opaque(OpaqueReason::Xbzrle),
            FLAG_HOOK => return opaque(OpaqueReason::Hook),
            FLAG_COMPRESS => return opaque(OpaqueReason::Compressed),
            _ => return opaque(OpaqueReason::UnknownFlags(flags as u16)),
        }
        let continued = flags & FLAG_CONTINUE != 0;
        let zero = flags & FLAG_ZERO != 0;
        let block = if continued { self.last_block } else { self.layout.id(cursor.name()?) };
        let Some(block) = block else { return opaque(OpaqueReason::UnknownBlock) };
        let index = PageIndex(word / PAGE_SIZE as u64);
        if !self.layout.holds(block, index) {
            return opaque(OpaqueReason::BeyondBlock);
        }
        if zero {
            match cursor.u8()? {
                0 => {}
                fill => return opaque(OpaqueReason::Fill(fill)),
            }
        } else {
            cursor.skip(PAGE_SIZE)?;
        }
        self.last_block = Some(block);
        Ok(Item::Page(PageItem { block, index, continued, zero }))
    }

    /// One entry of the block list, or what follows the last one.
    fn block(&mut self, cursor: &mut Cursor<'_>, section: u32, left: u64, first: bool) -> Parsed {
        // With postcopy an entry may be followed by its page size. A page size has no low bits, which every record
        // word has, and begins with a zero byte, which no name's length does.
        if self.postcopy && !first && cursor.peek_u8()? == 0 {
            let value = cursor.peek_u64()?;
            if value > PAGE_SIZE as u64 && value.is_power_of_two() {
                cursor.skip(8)?;
                self.layout.set_page_size(value);
                return Ok(Item::Framing);
            }
        }
        if left == 0 {
            self.state = State::Records(section);
            return self.record(cursor, section);
        }
        let name = cursor.name()?;
        let used = cursor.u64()?;
        if self.ignore_shared {
            cursor.skip(8)?;
        }
        let Some(left) = left.checked_sub(used) else { return opaque(OpaqueReason::BlockList) };
        if used == 0 || self.layout.add(name, used).is_none() {
            return opaque(OpaqueReason::BlockList);
        }
        self.state = State::Blocks { section, left, first: false };
        Ok(Item::Framing)
    }

    fn header(&mut self, cursor: &mut Cursor<'_>) -> Parsed {
        const MULTIFD_MAGIC: u32 = 0x1122_3344;
        match (cursor.u32()?, cursor.u32()?) {
            (MAGIC, STREAM_VERSION) => {
                self.state = State::Configuration;
                Ok(Item::Framing)
            }
            (MULTIFD_MAGIC, _) => opaque(OpaqueReason::Multifd),
            _ => opaque(OpaqueReason::NotQemu),
        }
    }

    fn section(&mut self, cursor: &mut Cursor<'_>) -> Parsed {
        let kind = cursor.u8()?;
        let mut item = Item::Framing;
        let next = match (kind, self.state) {
            (SECTION_CONFIGURATION, State::Configuration) => {
                let len = cursor.u32()? as usize;
                if len > MAX_MACHINE {
                    return opaque(OpaqueReason::UnknownConfiguration);
                }
                self.machine = Some(cursor.take(len)?.into());
                State::Subsections
            }
            (SECTION_SUBSECTION, State::Subsections) => {
                self.subsection(cursor)?;
                State::Subsections
            }
            (SECTION_COMMAND, _) => {
                self.command(cursor)?;
                State::Between
            }
            (SECTION_START, _) => {
                let id = cursor.u32()?;
                let name = cursor.name()?;
                let (_instance, version) = (cursor.u32()?, cursor.u32()?);
                if name != b"ram" || version != RAM_VERSION || self.ram.is_some() {
                    return opaque(OpaqueReason::ForeignSection);
                }
                self.ram = Some(id);
                item = Item::Section { last: false };
                State::Records(id)
            }
            (SECTION_PART | SECTION_END, _) => {
                let id = cursor.u32()?;
                if self.ram != Some(id) {
                    return opaque(OpaqueReason::ForeignSection);
                }
                item = Item::Section { last: kind == SECTION_END };
                State::Records(id)
            }
            (SECTION_FOOTER, State::Footer(id)) => {
                if cursor.u32()? != id {
                    return opaque(OpaqueReason::UnknownSection(kind));
                }
                item = Item::Footer;
                State::Between
            }
            (SECTION_FULL | SECTION_EOF, _) => return opaque(OpaqueReason::DeviceState),
            _ => return opaque(OpaqueReason::UnknownSection(kind)),
        };
        self.state = next;
        Ok(item)
    }

    fn subsection(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        const TARGET_PAGE_BITS: u32 = PAGE_SIZE.trailing_zeros();
        let (name, _version) = (cursor.name()?, cursor.u32()?);
        match name {
            b"configuration/target-page-bits" => {
                if cursor.u32()? != TARGET_PAGE_BITS {
                    return Err(Stop::Opaque(OpaqueReason::PageSize));
                }
            }
            b"configuration/capabilities" => {
                let count = cursor.u32()?;
                if count > MAX_CAPABILITIES {
                    return Err(Stop::Opaque(OpaqueReason::UnknownConfiguration));
                }
                let mut ignore_shared = false;
                for _ in 0..count {
                    match cursor.name()? {
                        b"x-ignore-shared" => ignore_shared = true,
                        _ => return Err(Stop::Opaque(OpaqueReason::Capability)),
                    }
                }
                self.ignore_shared = ignore_shared;
            }
            b"configuration/uuid" => cursor.skip(16)?,
            _ => return Err(Stop::Opaque(OpaqueReason::UnknownConfiguration)),
        }
        Ok(())
    }

    fn command(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        let (command, len) = (cursor.u16()?, cursor.u16()?);
        match (command, len) {
            // OPEN_RETURN_PATH, PING, SWITCHOVER_START
            (1, 0) | (2, 4) | (11, 0) => {}
            // POSTCOPY_ADVISE: 16 bytes where RAM takes part
            (3, 0) => {}
            (3, 16) => self.postcopy = true,
            _ => return Err(Stop::Opaque(OpaqueReason::UnknownCommand(command))),
        }
        cursor.skip(usize::from(len))
    }
}

enum Stop {
    NeedMore,
    Opaque(OpaqueReason),
}

type Parsed = Result<Item, Stop>;

fn opaque(reason: OpaqueReason) -> Parsed {
    Err(Stop::Opaque(reason))
}

/// Reads big-endian values from the front of bytes that may be short.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let piece = self.bytes.get(self.at..).and_then(|rest| rest.get(..len)).ok_or(Stop::NeedMore)?;
        self.at += len;
        Ok(piece)
    }

    fn skip(&mut self, len: usize) -> Result<(), Stop> {
        self.take(len).map(|_| ())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        self.take(N)?.try_into().map_err(|_| Stop::NeedMore)
    }

    fn u8(&mut self) -> Result<u8, Stop> {
        self.array().map(|[byte]: [u8; 1]| byte)
    }

    fn u16(&mut self) -> Result<u16, Stop> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Stop> {
        self.array().map(u64::from_be_bytes)
    }

    fn peek_u8(&self) -> Result<u8, Stop> {
        Cursor { bytes: self.bytes, at: self.at }.u8()
    }

    fn peek_u64(&self) -> Result<u64, Stop> {
        Cursor { bytes: self.bytes, at: self.at }.u64()
    }

    /// A byte of length and that many bytes.
    fn name(&mut self) -> Result<&'a [u8], Stop> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }
}
