//! A stream's pages on multifd channels, as QEMU puts them there: the inverse of [`multifd::Merger`](crate::multifd::Merger), for tests.

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_ZERO};
use dwcp_proto::{PageIndex, RamBlockId};

use crate::multifd::packet::{FLAG_SYNC, GREETING, HEADER, MAGIC, OFFSETS, PAGES, VERSION};
use crate::stream::{FLAG_MULTIFD_FLUSH, Item, PageItem, Parser, Step};

/// How QEMU does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// As 7.2: synchronises at each EOS; a SYNC may come with the pages before it, and an empty header then follows.
    Old,
    /// As 8.1 and newer with a machine type of before: synchronises at each EOS.
    Eos,
    /// As 8.1 and newer: synchronises where the stream says MULTIFD_FLUSH, and at the first EOS, where this adds one.
    Flush,
    /// The same, with zero pages on the channels (`zero-page-detection=multifd`).
    FlushZeros,
}

impl Style {
    /// All of them.
    pub const ALL: [Style; 4] = [Style::Old, Style::Eos, Style::Flush, Style::FlushZeros];
}

/// What was put where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scattered {
    /// On the main channel.
    pub main: Vec<u8>,
    /// On each multifd channel.
    pub channels: Vec<Vec<u8>>,
}

/// Puts a stream's pages onto channels, one packet after the other.
#[derive(Debug)]
pub struct Scatter {
    style: Style,
    parser: Parser,
    passing: bool,
    out: Scattered,
    /// The packet that is being filled: its block, and its pages, `None` for one of zeros.
    block: Option<RamBlockId>,
    queue: Vec<(PageIndex, Option<Vec<u8>>)>,
    next: usize,
    packets: u64,
    main_block: Option<RamBlockId>,
    begun: bool,
    /// Each channel's last header, of which an older QEMU repeats a part.
    stale: Vec<Vec<u8>>,
}

impl Scatter {
    /// Onto so many channels, at least 1.
    pub fn new(channels: usize, style: Style) -> Self {
        let channels = channels.max(1);
        let greeting = |n: usize| {
            let mut greeting = Vec::with_capacity(GREETING);
            greeting.extend_from_slice(&MAGIC.to_be_bytes());
            greeting.extend_from_slice(&VERSION.to_be_bytes());
            greeting.resize(24, 0);
            greeting.push(n as u8);
            greeting.resize(GREETING, 0);
            greeting
        };
        Scatter {
            style,
            parser: Parser::new(),
            passing: false,
            out: Scattered { main: Vec::new(), channels: (0..channels).map(greeting).collect() },
            block: None,
            queue: Vec::new(),
            next: 0,
            packets: 0,
            main_block: None,
            begun: false,
            stale: vec![vec![0; HEADER]; channels],
        }
    }

    /// Takes a stretch of whole items; returns what goes where since the last call.
    pub fn feed(&mut self, stream: &[u8]) -> Scattered {
        let mut rest = stream;
        while !rest.is_empty() {
            let step = if self.passing { None } else { Some(self.parser.step(rest)) };
            let Some(Step::Item(len, item)) = step else {
                self.passing = true;
                self.out.main.extend_from_slice(rest);
                break;
            };
            let (bytes, after) = rest.split_at(len);
            rest = after;
            self.item(item, bytes);
        }
        let channels = vec![Vec::new(); self.out.channels.len()];
        std::mem::replace(&mut self.out, Scattered { main: Vec::new(), channels })
    }

    fn item(&mut self, item: Item, bytes: &[u8]) {
        let flushes = matches!(self.style, Style::Flush | Style::FlushZeros);
        match item {
            Item::Page(page) if page.zero && self.style != Style::FlushZeros => self.zero_on_main(page),
            Item::Page(page) => {
                if self.block != Some(page.block) || self.queue.len() == PAGES {
                    self.send(false);
                }
                self.block = Some(page.block);
                let content = (!page.zero).then(|| bytes[bytes.len() - PAGE_SIZE..].to_vec());
                self.queue.push((page.index, content));
            }
            Item::Flush if flushes => {
                self.synchronise();
                self.out.main.extend_from_slice(bytes);
            }
            Item::Flush => {}
            Item::Eos => {
                if !flushes || !self.begun {
                    self.synchronise();
                }
                if flushes && !self.begun {
                    self.out.main.extend_from_slice(&FLAG_MULTIFD_FLUSH.to_be_bytes());
                }
                self.begun = true;
                self.out.main.extend_from_slice(bytes);
            }
            Item::Framing | Item::Section { .. } | Item::Footer => self.out.main.extend_from_slice(bytes),
        }
    }

    fn zero_on_main(&mut self, page: PageItem) {
        let continued = self.main_block == Some(page.block);
        let flags = FLAG_ZERO | if continued { FLAG_CONTINUE } else { 0 };
        self.out.main.extend_from_slice(&((page.index.0 * PAGE_SIZE as u64) | flags).to_be_bytes());
        if !continued {
            let name = self.name(page.block);
            self.out.main.push(name.len() as u8);
            self.out.main.extend_from_slice(&name);
        }
        self.out.main.push(0);
        self.main_block = Some(page.block);
    }

    fn synchronise(&mut self) {
        let combines = self.style == Style::Old && !self.queue.is_empty();
        let with = self.next;
        self.send(combines);
        for n in 0..self.out.channels.len() {
            if combines && n == with {
                self.header(n, 0, &[]);
            } else {
                self.header(n, FLAG_SYNC, &[]);
            }
        }
    }

    /// Sends the packet that was filled, if there is anything in it.
    fn send(&mut self, sync: bool) {
        if self.queue.is_empty() {
            return;
        }
        let mut queue = std::mem::take(&mut self.queue);
        // Those of zeros come last, in their order.
        queue.sort_by_key(|(_, content)| content.is_none());
        let n = self.next;
        self.next = (n + 1) % self.out.channels.len();
        self.header(n, if sync { FLAG_SYNC } else { 0 }, &queue);
        for content in queue.iter().filter_map(|(_, content)| content.as_ref()) {
            self.out.channels[n].extend_from_slice(content);
        }
    }

    fn header(&mut self, n: usize, flags: u32, queue: &[(PageIndex, Option<Vec<u8>>)]) {
        let name = self.block.map(|block| self.name(block)).unwrap_or_default();
        let pages = queue.iter().filter(|(_, content)| content.is_some()).count();
        let stale = self.style == Style::Old && queue.is_empty();
        let mut header = if stale { self.stale[n].clone() } else { vec![0; HEADER] };
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_be_bytes());
        put(4, &VERSION.to_be_bytes());
        put(8, &flags.to_be_bytes());
        put(12, &(PAGES as u32).to_be_bytes());
        put(16, &(pages as u32).to_be_bytes());
        put(24, &self.packets.to_be_bytes());
        put(32, &((queue.len() - pages) as u32).to_be_bytes());
        if !stale {
            put(20, &((pages * PAGE_SIZE) as u32).to_be_bytes());
            put(64, &name);
            for (i, (page, _)) in queue.iter().enumerate() {
                put(OFFSETS + 8 * i, &(page.0 * PAGE_SIZE as u64).to_be_bytes());
            }
        }
        self.packets += 1;
        self.out.channels[n].extend_from_slice(&header);
        self.stale[n] = header;
    }

    fn name(&self, block: RamBlockId) -> Vec<u8> {
        self.parser.layout.names().name(block).unwrap_or_default().to_vec()
    }
}
