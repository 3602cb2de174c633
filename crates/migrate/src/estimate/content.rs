//! A sample of the guest's pages, where they can be read, looked at three times.

use std::array;
use std::collections::HashSet;
use std::time::{Duration, Instant};

use dwcp_hde::{Choice as Compression, Glance, Glances, Scales};
use dwcp_proto::PageIndex;
use dwcp_proto::limits::PAGE_SIZE;
use dwcp_vmm::mapped::{MappedError, Page, Ram};
use tokio::task::spawn_blocking;
use tokio::time::sleep_until;

use crate::error::{Blame, Failure};
use crate::handshake::nonce;

/// When the pages are looked at again, seconds after the first time.
pub(super) const SOON: u32 = 1;
/// And once more.
pub(super) const LATER: u32 = 3;
/// Stretches of memory that are looked at, evenly spread, and the pages of each: 16 MiB in all.
const STRETCHES: u64 = 256;
const LENGTH: u64 = 16;
/// Pages of which a line is looked at to find copies, at most: those of 4 GiB. Beyond, copies are found only among as many.
const LINES: u64 = 1 << 20;
/// Where in the page that line lies, and its length: not at the beginning, where unlike pages are alike.
const LINE_AT: usize = 1024 + 512;
const LINE: usize = 64;
/// One line's content of so many is looked into, page by page.
const CHOSEN: u64 = 16;
/// Copies among fewer pages say nothing.
const FEW: usize = 256;
/// Bytes that are compressed together, as in a chunk.
const CHUNK: usize = 256 << 10;

/// What the sample showed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Seen {
    /// The share of pages that are zero.
    pub(super) zero: f64,
    /// Bytes after compression for each byte of the others.
    pub(super) first: Option<f64>,
    /// The share of them that are copies of others.
    pub(super) copies: f64,
    /// Bytes of a delta for each byte of a page that was written to.
    pub(super) again: Option<f64>,
    /// Bytes of memory dirtied within [`SOON`] and within [`LATER`].
    pub(super) dirty: Option<(f64, f64)>,
    /// Bytes a second that one processor compressed.
    pub(super) encode_rate: Option<f64>,
}

impl Seen {
    /// Nothing.
    pub(super) fn unknown() -> Self {
        Seen { zero: 0.0, first: None, copies: 0.0, again: None, dirty: None, encode_rate: None }
    }
}

/// Looks at the pages of `ram`, and again if the guest runs.
pub(super) async fn watch(ram: Ram, compression: Compression, runs: bool) -> Result<Seen, Failure> {
    let seed = nonce()?;
    let bytes = ram.bytes() as f64;
    let started = Instant::now();
    let (ram, first) = on_thread(move || First::look(ram, &seed, compression)).await?;
    let mut seen = Seen { dirty: Some((0.0, 0.0)), ..first.seen.clone() };
    if !runs {
        return Ok(seen);
    }
    let at = |seconds: u32| sleep_until((started + Duration::from_secs(seconds.into())).into());
    at(SOON).await;
    let (ram, first, soon) = on_thread(move || first.again(ram, None)).await?;
    at(LATER).await;
    let (_, first, later) = on_thread(move || first.again(ram, Some(compression))).await?;
    let share = |pages: u64| pages as f64 / first.pages.len().max(1) as f64 * bytes;
    seen.dirty = Some((share(soon.pages), share(later.pages)));
    seen.again = later.ratio;
    Ok(seen)
}

async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MappedError> + Send + 'static,
) -> Result<T, Failure> {
    let failed = |text: String| Failure::new("ram_unreachable", Blame::Vmm, text, "is the VMM still there?");
    match spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| failed(crate::hde::words(&error))),
        Err(_) => Err(Failure::new("task", Blame::Local, "looking at memory failed", "please report this")),
    }
}

/// The first look, which later ones are held against.
struct First {
    glances: Glances,
    /// Each page: where, and what it looked like.
    pages: Vec<(Box<[u8]>, PageIndex, Glance)>,
    seen: Seen,
}

/// What a later look found.
struct Later {
    /// Pages that had changed.
    pages: u64,
    /// What their deltas take of them.
    ratio: Option<f64>,
}

impl First {
    fn look(ram: Ram, seed: &[u8; 32], compression: Compression) -> Result<(Ram, Self), MappedError> {
        let glances = Glances::new(seed);
        let (mut pages, mut zeros) = (Vec::new(), 0u64);
        let mut scale = Scale::new(compression);
        let mut page: Page = [0; PAGE_SIZE];
        for (block, index) in places(&ram) {
            ram.read(&block, index, &mut page)?;
            match page == [0; PAGE_SIZE] {
                true => zeros += 1,
                false => scale.put(&page),
            }
            pages.push((block, index, glances.of(&page)));
        }
        let total = pages.len().max(1) as f64;
        let (ratio, rate) = scale.read();
        let copies = if compression == Compression::Raw { 0.0 } else { copies(&ram)? };
        let seen = Seen {
            zero: zeros as f64 / total,
            // A guest without content costs nothing, whatever the ratio.
            first: Some(ratio.unwrap_or(1.0)),
            copies,
            encode_rate: rate,
            ..Seen::unknown()
        };
        Ok((ram, First { glances, pages, seen }))
    }

    fn again(self, ram: Ram, weigh: Option<Compression>) -> Result<(Ram, Self, Later), MappedError> {
        let mut scale = Scale::new(weigh.unwrap_or(Compression::Raw));
        let (mut page, mut lines): (Page, Vec<u8>) = ([0; PAGE_SIZE], Vec::new());
        let (mut changed, mut beside) = (0u64, 0);
        for (block, index, before) in &self.pages {
            ram.read(block, *index, &mut page)?;
            let now = self.glances.of(&page);
            if before.differs(&now) {
                changed += 1;
                beside += before.delta(&now, &page, &mut lines);
                scale.put(&lines);
                lines.clear();
            }
        }
        let light = scale.finish() + beside;
        let ratio =
            (weigh.is_some() && changed > 0).then(|| light as f64 / (changed * PAGE_SIZE as u64) as f64);
        Ok((ram, self, Later { pages: changed, ratio }))
    }
}

/// The share of pages that are not zero and have the content of one before them. Pages are chosen by what they hold, not by where they
/// lie, so that copies are chosen together.
fn copies(ram: &Ram) -> Result<f64, MappedError> {
    let word = |hash: blake3::Hash| u64::from_le_bytes(array::from_fn(|n| hash.as_bytes()[n]));
    let all = ram.bytes() / PAGE_SIZE as u64;
    let (mut line, mut page): ([u8; LINE], Page) = ([0; LINE], [0; PAGE_SIZE]);
    let (mut contents, mut chosen) = (HashSet::new(), 0usize);
    for (block, bytes) in ram.sizes() {
        let pages = bytes / PAGE_SIZE as u64;
        let some = (u128::from(pages) * u128::from(LINES.min(all)) / u128::from(all.max(1))) as u64;
        for index in (0..some).map(PageIndex) {
            ram.read_part(block, index, LINE_AT, &mut line)?;
            if line == [0; LINE] || !word(blake3::hash(&line)).is_multiple_of(CHOSEN) {
                continue;
            }
            ram.read(block, index, &mut page)?;
            contents.insert(word(blake3::hash(&page)));
            chosen += 1;
        }
    }
    Ok(if chosen < FEW { 0.0 } else { 1.0 - contents.len() as f64 / chosen as f64 })
}

/// Evenly spread stretches of all blocks.
fn places(ram: &Ram) -> Vec<(Box<[u8]>, PageIndex)> {
    let all = ram.bytes() / PAGE_SIZE as u64;
    let step = (all / STRETCHES).max(1);
    let mut places = Vec::new();
    for (block, bytes) in ram.sizes() {
        let pages = bytes / PAGE_SIZE as u64;
        for start in (0..pages).step_by(step as usize) {
            // In small memory stretches touch; none is looked at twice.
            let end = (start + LENGTH.min(step)).min(pages);
            places.extend((start..end).map(|index| (block.into(), PageIndex(index))));
        }
    }
    places
}

/// Content gathered into chunks, and what these weigh.
struct Scale {
    scales: Scales,
    compression: Compression,
    chunk: Vec<u8>,
    before: usize,
    after: usize,
    time: Duration,
}

impl Scale {
    fn new(compression: Compression) -> Self {
        let chunk = Vec::with_capacity(CHUNK + PAGE_SIZE);
        Scale { scales: Scales::new(), compression, chunk, before: 0, after: 0, time: Duration::ZERO }
    }

    fn put(&mut self, content: &[u8]) {
        self.chunk.extend_from_slice(content);
        if self.chunk.len() >= CHUNK {
            self.weigh();
        }
    }

    fn weigh(&mut self) {
        let started = Instant::now();
        self.after += self.scales.weigh(&self.chunk, self.compression);
        self.time += started.elapsed();
        self.before += self.chunk.len();
        self.chunk.clear();
    }

    /// Bytes of all of it after compression.
    fn finish(&mut self) -> usize {
        if !self.chunk.is_empty() {
            self.weigh();
        }
        self.after
    }

    /// The ratio, and the bytes a second that were weighed.
    fn read(mut self) -> (Option<f64>, Option<f64>) {
        self.finish();
        let some = self.before > 0;
        let rate = self.before as f64 / self.time.as_secs_f64().max(1e-6);
        (some.then(|| self.after as f64 / self.before as f64), some.then_some(rate))
    }
}
