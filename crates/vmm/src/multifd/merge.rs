//! The machine that puts channels together.

use std::io::{self, IoSliceMut};

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::record::{FLAG_PAGE, FLAG_ZERO, RECORD_WORD};

use super::packet::{self, ChannelFault, GREETING, HEADER, PAGES, Packet};
use crate::stream::output::{End, Output, Place, Room, block_name, write_head};
use crate::stream::{Item, MAX_ITEM, OpaqueReason, Parser, Step};

/// Channels beside the main one. QEMU takes up to 255; beyond a few the agent is what bounds the rate.
pub const MAX_CHANNELS: usize = 16;

/// Bytes of room that [`Merger::merge`] and [`Merger::fill`] ask for: the longest item, with its block's name where it had none, and the ends and
/// beginnings of sections around it.
pub const MIN_ROOM: usize = MAX_ITEM + 64;

/// Bytes of the main channel that are read ahead: without zero pages it says some 30 bytes for megabytes of pages, with them 9 bytes a page.
const MAIN_BUFFER: usize = 64 << 10;

/// Which connection bytes belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The main channel.
    Main,
    /// A multifd channel, in the order in which they were accepted.
    Channel(usize),
}

/// Channels that cannot be put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// A channel's bytes.
    #[error("multifd channel {channel}: {fault}")]
    Channel {
        /// Which, in the order in which they were accepted.
        channel: usize,
        /// What is wrong.
        #[source]
        fault: ChannelFault,
    },
    /// The main channel holds something whose length is not known, and RAM is not over.
    #[error("the main channel cannot be followed to the end of RAM: {0}")]
    Main(OpaqueReason),
    /// MULTIFD_FLUSH where the ends of sections were the sync points so far.
    #[error("the main channel synchronises in two ways")]
    Sync,
}

/// What a call of [`Merger::merge`] put out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Merged {
    /// Bytes.
    pub len: usize,
    /// All channels were synchronised behind these bytes: a page may be sent again from there on.
    pub synchronised: bool,
}

/// What came of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// Bytes that were read; 0 at the end of the connection.
    pub read: usize,
    /// Bytes that were put out thereby.
    pub len: usize,
}

/// Puts the main channel and the multifd channels of a migration together: see [the module](super).
///
/// The caller reads what [`current`](Self::current) or else [`wants`](Self::wants) asks for, by [`fill`](Self::fill), and calls
/// [`merge`](Self::merge) until that puts nothing out. Both write to the front of the room that they are given, which is the stream; pages
/// are read to where they belong in it. Memory is 64 KiB and 1.4 KiB a channel.
#[derive(Debug)]
pub struct Merger {
    main: Main,
    parser: Parser,
    channels: Vec<Channel>,
    /// Ids that have come.
    ids: u32,
    /// A header is whole and not parsed yet.
    due: bool,
    /// The channel whose packet is being put out.
    current: Option<usize>,
    /// Bytes that the last page, which was begun, still wants.
    page_left: usize,
    sync: Option<Sync>,
    /// The main channel stands at its sync point.
    waits: bool,
    /// The first section has ended: pages may come.
    begun: bool,
    /// The section is the last one.
    last: bool,
    /// The last section has ended.
    over: bool,
    out: Output,
}

/// What the main channel's sync points are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sync {
    Flush,
    Eos,
}

/// Bytes of the main channel that were read and not put out.
#[derive(Debug)]
struct Main {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    ended: bool,
    /// RAM is over: the rest is passed on as it comes.
    passing: bool,
}

#[derive(Debug)]
struct Channel {
    head: Box<[u8; HEADER]>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// So many bytes of the greeting are there.
    Greeting(usize),
    /// So many bytes of a header are there; all of them: it is to be parsed.
    Header(usize),
    /// A packet with pages, of which so many were put out or begun.
    Pages(Packet, usize),
    /// Behind its SYNC.
    Waiting,
    Ended,
}

impl Merger {
    /// For so many multifd channels, at most [`MAX_CHANNELS`].
    pub fn new(channels: usize) -> Self {
        let channel = || Channel { head: Box::new([0; HEADER]), state: State::Greeting(0) };
        Merger {
            main: Main {
                buffer: vec![0; MAIN_BUFFER].into(),
                start: 0,
                end: 0,
                ended: false,
                passing: false,
            },
            parser: Parser::new(),
            channels: (0..channels.min(MAX_CHANNELS)).map(|_| channel()).collect(),
            ids: 0,
            due: false,
            current: None,
            page_left: 0,
            sync: None,
            waits: false,
            begun: false,
            last: false,
            over: false,
            out: Output::new(),
        }
    }

    /// The channel whose packet is being put out: nothing else comes out until it is whole.
    pub fn current(&self) -> Option<Source> {
        self.current.map(Source::Channel)
    }

    /// Whether [`fill`](Self::fill) has a place for bytes of `source` now.
    pub fn wants(&self, source: Source) -> bool {
        match source {
            Source::Main => {
                !self.main.ended && !self.waits && self.current.is_none() && self.main.len() < MAIN_BUFFER
            }
            Source::Channel(n) if self.current.is_some_and(|current| current != n) => false,
            Source::Channel(n) => match self.channels.get(n).map(|channel| channel.state) {
                Some(State::Greeting(have)) => have < GREETING,
                Some(State::Header(have)) => have < HEADER,
                Some(State::Pages(packet, next)) if self.current == Some(n) => {
                    self.page_left > 0 || next < packet.pages
                }
                _ => false,
            },
        }
    }

    /// Lets `read` read bytes of `source` to where they belong, which for pages is `room`, of at least [`MIN_ROOM`] bytes. `read` gets
    /// the places in order and returns how many bytes it wrote to the front of them; 0 is the end of the connection.
    ///
    /// # Errors
    /// Those of `read`; and [`io::ErrorKind::WouldBlock`] where `source` is not [wanted](Self::wants).
    pub fn fill(
        &mut self,
        source: Source,
        room: &mut [u8],
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> io::Result<Filled> {
        if !self.wants(source) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = match source {
            Source::Main => return self.main.fill(read),
            Source::Channel(n) => n,
        };
        let Channel { head, state } = &mut self.channels[n];
        let (have, whole) = match *state {
            State::Greeting(have) => (have, GREETING),
            State::Header(have) => (have, HEADER),
            State::Pages(packet, next) => return self.fill_pages(n, packet, next, room, read),
            State::Waiting | State::Ended => return Err(io::ErrorKind::WouldBlock.into()),
        };
        let place = &mut head[have..whole];
        let most = place.len();
        let read = read(&mut [IoSliceMut::new(place)])?.min(most);
        let have = have + read;
        match state {
            State::Greeting(_) => *state = State::Greeting(have),
            _ => *state = State::Header(have),
        }
        self.due |= have == whole;
        if read == 0 {
            *state = State::Ended;
        }
        Ok(Filled { read, len: 0 })
    }

    /// Reads pages of the current packet, of which `next` is the first that was not begun.
    fn fill_pages(
        &mut self,
        n: usize,
        packet: Packet,
        next: usize,
        room: &mut [u8],
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> io::Result<Filled> {
        let Channel { head, state } = &mut self.channels[n];
        let mut slots = Vec::with_capacity(PAGES + 1);
        let (slot, mut rest) = room.split_at_mut(self.page_left.min(room.len()));
        if !slot.is_empty() {
            slots.push(IoSliceMut::new(slot));
        }
        let mut named = self.out.block != Some(packet.block);
        let name = block_name(&self.parser.layout, packet.block);
        let first = RECORD_WORD + if named { 1 + name.len() } else { 0 };
        for page in next..packet.pages {
            let len = if named { first } else { RECORD_WORD };
            if rest.len() < len + PAGE_SIZE {
                break;
            }
            let (word, slot_and_rest) = rest.split_at_mut(len);
            write_head(word, packet::page(head, page), FLAG_PAGE, named.then_some(name));
            let (slot, after) = slot_and_rest.split_at_mut(PAGE_SIZE);
            slots.push(IoSliceMut::new(slot));
            (rest, named) = (after, false);
        }
        let most = slots.iter().map(|slot| slot.len()).sum();
        let read = read(&mut slots)?.min(most);
        if read == 0 {
            *state = State::Ended;
            return Ok(Filled { read, len: 0 });
        }
        let of_page = read.min(self.page_left);
        self.page_left -= of_page;
        let pages = (read - of_page).div_ceil(PAGE_SIZE);
        let mut len = read + pages * RECORD_WORD;
        if pages > 0 {
            len += first - RECORD_WORD;
            self.page_left = pages * PAGE_SIZE - (read - of_page);
            self.out.block = Some(packet.block);
        }
        *state = State::Pages(packet, next + pages);
        Ok(Filled { read, len })
    }

    /// Tells that `source` has ended. Returns whether it may end here; where it may not, the migration has failed, and why is the VMM's to say.
    pub fn ended(&mut self, source: Source) -> bool {
        match source {
            Source::Main => {
                self.main.ended = true;
                self.main.passing
            }
            Source::Channel(n) => {
                if let Some(channel) = self.channels.get_mut(n) {
                    channel.state = State::Ended;
                }
                self.current != Some(n) && self.is_over()
            }
        }
    }

    /// Puts out what is whole and not a page's content, into `room` of at least [`MIN_ROOM`] bytes. Where it returns no bytes and no
    /// synchronisation, it takes further bytes to go on.
    ///
    /// # Errors
    /// What a channel holds is not what QEMU writes, or the main channel cannot be followed. What was put out before is right.
    pub fn merge(&mut self, room: &mut [u8]) -> Result<Merged, MergeError> {
        let mut room = Room { bytes: room, len: 0 };
        loop {
            if self.page_left > 0 || room.left() < MIN_ROOM {
                break;
            }
            if self.due {
                self.parse_heads()?;
            }
            if let Some(n) = self.current {
                if self.finish_packet(n, &mut room) {
                    continue;
                }
                break;
            }
            if self.waits && self.channels.iter().all(|channel| channel.state == State::Waiting) {
                self.channels.iter_mut().for_each(|channel| channel.state = State::Header(0));
                self.waits = false;
                return Ok(Merged { len: room.len, synchronised: true });
            }
            if !self.waits && self.main_item(&mut room)? {
                continue;
            }
            if !self.next_packet(&mut room)? {
                break;
            }
        }
        Ok(Merged { len: room.len, synchronised: false })
    }

    /// Parses the headers that are whole. One with pages that comes before the list of RAM blocks has to wait for that.
    fn parse_heads(&mut self) -> Result<(), MergeError> {
        self.due = false;
        let count = self.channels.len();
        for (n, channel) in self.channels.iter_mut().enumerate() {
            let failed = |fault| MergeError::Channel { channel: n, fault };
            match channel.state {
                State::Greeting(GREETING) => {
                    let id = packet::greeting(&channel.head).map_err(failed)?;
                    let bit = 1_u32.checked_shl(id.into()).unwrap_or_default();
                    if usize::from(id) >= count || self.ids & bit != 0 {
                        return Err(failed(ChannelFault::Id(id)));
                    }
                    self.ids |= bit;
                    channel.state = State::Header(0);
                }
                State::Header(HEADER) if packet::has_pages(&channel.head) && !self.begun => self.due = true,
                State::Header(HEADER) => {
                    let packet = Packet::parse(&channel.head, &self.parser.layout).map_err(failed)?;
                    channel.state = match packet {
                        Packet { pages: 0, zeros: 0, sync: true, .. } => State::Waiting,
                        Packet { pages: 0, zeros: 0, sync: false, .. } => State::Header(0),
                        _ => State::Pages(packet, 0),
                    };
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts out the current packet's zero pages and leaves it, if its other pages are out.
    fn finish_packet(&mut self, n: usize, room: &mut Room<'_>) -> bool {
        let Channel { head, state } = &mut self.channels[n];
        let State::Pages(packet, next) = *state else { return false };
        if next < packet.pages {
            return false;
        }
        let all = packet.pages + packet.zeros;
        let mut next = next;
        while next < all && room.left() >= MIN_ROOM {
            let named = self.out.block != Some(packet.block);
            let name = named.then(|| block_name(&self.parser.layout, packet.block));
            room.page(packet::page(head, next), FLAG_ZERO, name, &[0]);
            self.out.block = Some(packet.block);
            next += 1;
        }
        *state = State::Pages(packet, next);
        if next == all {
            *state = if packet.sync { State::Waiting } else { State::Header(0) };
            self.current = None;
        }
        true
    }

    /// Begins with the oldest packet that is there: so pages mostly ascend.
    fn next_packet(&mut self, room: &mut Room<'_>) -> Result<bool, MergeError> {
        let packets = self.channels.iter().enumerate().filter_map(|(n, channel)| match channel.state {
            State::Pages(packet, _) => Some((packet.number, n)),
            _ => None,
        });
        let Some((_, n)) = packets.min() else { return Ok(false) };
        if self.is_over() {
            return Err(MergeError::Channel { channel: n, fault: ChannelFault::Late });
        }
        if let (Place::Outside, Some(section)) = (self.out.place, self.parser.ram_section()) {
            self.out.begin_ours(section, room);
        }
        self.current = Some(n);
        Ok(true)
    }

    /// RAM has ended on all channels.
    fn is_over(&self) -> bool {
        self.over && !self.waits
    }

    /// Takes the next item of the main channel, if it is whole.
    fn main_item(&mut self, room: &mut Room<'_>) -> Result<bool, MergeError> {
        let bytes = &self.main.buffer[self.main.start..self.main.end];
        if bytes.is_empty() {
            return Ok(false);
        }
        if self.main.passing {
            let len = bytes.len().min(room.left());
            room.put(&bytes[..len]);
            self.main.start += len;
            return Ok(true);
        }
        let (len, item) = match self.parser.step(bytes) {
            Step::Item(len, item) => (len, item),
            Step::NeedMore if bytes.len() == MAIN_BUFFER => {
                return Err(MergeError::Main(OpaqueReason::UnknownConfiguration));
            }
            Step::NeedMore => return Ok(false),
            Step::Opaque(_) if self.is_over() => {
                self.out.leave(self.parser.ram_section(), room);
                self.main.passing = true;
                return Ok(true);
            }
            Step::Opaque(reason) => return Err(MergeError::Main(reason)),
        };
        let item_bytes = &bytes[..len.min(bytes.len())];
        let section = self.parser.ram_section();
        match item {
            Item::Page(page) => self.out.page(page, item_bytes, &self.parser.layout, room),
            Item::Framing => {
                self.out.leave(section, room);
                room.put(item_bytes);
            }
            Item::Section { last } => {
                self.out.leave(section, room);
                room.put(item_bytes);
                self.out.place = Place::Theirs;
                (self.last, self.over) = (last, false);
            }
            Item::Flush => {
                if *self.sync.get_or_insert(Sync::Flush) != Sync::Flush {
                    return Err(MergeError::Sync);
                }
                self.waits = true;
            }
            Item::Eos => {
                self.waits = *self.sync.get_or_insert(Sync::Eos) == Sync::Eos;
                self.begun = true;
                self.over = self.last;
                self.out.held = Some(End::Eos);
            }
            Item::Footer => {
                self.out.footers = true;
                self.out.held = Some(End::Footer);
            }
        }
        self.main.start += item_bytes.len();
        Ok(true)
    }
}

impl Main {
    fn len(&self) -> usize {
        self.end - self.start
    }

    fn fill(&mut self, read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>) -> io::Result<Filled> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.len());
        let place = &mut self.buffer[self.end..];
        let most = place.len();
        let read = read(&mut [IoSliceMut::new(place)])?.min(most);
        self.end += read;
        Ok(Filled { read, len: 0 })
    }
}
