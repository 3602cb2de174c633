//! The self-checking guest: the only program in a test VM, started by the kernel as `/init`.
//!
//! It fills memory with pages that each carry their address, version and checksum, goes on rewriting some of them, and
//! re-reads all of them all the time. The version that each page must have is kept apart from the pages, so a page that
//! is whole but *old* is wrong too. What it finds goes to the console, five lines a second:
//!
//! ```text
//! guest start pages=16384 rate=2000
//! guest ok seq=7 checked=28672 passes=1 wrote=2801 wrong=0
//! guest WRONG page=17 why=checksum version=3 expected=3
//! guest bad seq=8 checked=32768 passes=2 wrote=3201 wrong=1
//! ```
//!
//! Settings are kernel parameters, which the kernel hands to its init as environment variables: see [`Settings`].

mod page;

use std::io::Write;
use std::time::{Duration, Instant};

use page::{Expected, Mix, Page, Rng};

/// One round of writing and checking.
const TICK: Duration = Duration::from_millis(10);
/// Time between two lines on the console.
const REPORT: Duration = Duration::from_millis(200);
/// Most time that one tick makes up for, so that a guest that stood still does not come back with a burst.
const CATCH_UP: Duration = Duration::from_millis(100);
/// Wrong pages that are named one by one; the rest is only counted.
const NAMED: u64 = 20;

/// What the kernel parameters ask for.
struct Settings {
    /// `guest_mib`: memory under test.
    pages: usize,
    /// `guest_rate`: pages rewritten a second; 0 is an idle guest.
    rate: u64,
    /// `guest_bytes`: bytes changed in each of them.
    bytes: usize,
    /// `guest_hot_mib`: only the first so many MiB are rewritten; 0 means all.
    hot: usize,
    /// `guest_check`: pages checked a second.
    check: u64,
    /// `guest_mix`: `mixed`, `random` (incompressible), `text`, `pointers`, `zero`.
    mix: Mix,
    /// `guest_seed`.
    seed: u64,
}

impl Settings {
    fn from_env() -> Self {
        let number = |name: &str, default: u64| {
            std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
        };
        let pages = |mib: u64| mib as usize * (1 << 20) / page::SIZE;
        let total = pages(number("guest_mib", 64).max(1));
        let hot = pages(number("guest_hot_mib", 0));
        Settings {
            pages: total,
            rate: number("guest_rate", 2000),
            bytes: number("guest_bytes", 64) as usize,
            hot: if hot == 0 { total } else { hot.min(total) },
            check: number("guest_check", 20_000),
            mix: std::env::var("guest_mix").ok().and_then(|name| Mix::parse(&name)).unwrap_or(Mix::Mixed),
            seed: number("guest_seed", 1),
        }
    }
}

/// The memory under test and what is known about it.
struct Memory {
    pages: Vec<Page>,
    expected: Vec<Expected>,
    hot: usize,
    cursor: usize,
    rng: Rng,
    checked: u64,
    wrote: u64,
    wrong: u64,
}

impl Memory {
    fn fill(settings: &Settings) -> Self {
        let mut rng = Rng::new(settings.seed);
        let mut pages = vec![Page::ZERO; settings.pages];
        let expected = pages
            .iter_mut()
            .enumerate()
            .map(|(index, page)| page.fill(index as u64, settings.mix.kind(index as u64), &mut rng))
            .collect();
        Memory { pages, expected, hot: settings.hot, cursor: 0, rng, checked: 0, wrote: 0, wrong: 0 }
    }

    fn rewrite(&mut self, bytes: usize) {
        let index = self.rng.below(self.hot);
        self.pages[index].rewrite(index as u64, bytes, &mut self.expected[index], &mut self.rng);
        self.wrote += 1;
    }

    fn check_next(&mut self) {
        let index = self.cursor;
        self.cursor = (self.cursor + 1) % self.pages.len();
        self.checked += 1;
        if let Err(why) = self.pages[index].check(index as u64, self.expected[index]) {
            self.wrong += 1;
            if self.wrong <= NAMED {
                let (found, expected) = (self.pages[index].version(), self.expected[index].version());
                say(&format!("guest WRONG page={index} why={why} version={found} expected={expected}"));
            }
        }
    }

    fn report(&self, seq: u64) -> String {
        let word = if self.wrong == 0 { "ok" } else { "bad" };
        let passes = self.checked / self.pages.len() as u64;
        let (checked, wrote, wrong) = (self.checked, self.wrote, self.wrong);
        format!("guest {word} seq={seq} checked={checked} passes={passes} wrote={wrote} wrong={wrong}")
    }
}

fn main() {
    let settings = Settings::from_env();
    say(&format!("guest start pages={} rate={}", settings.pages, settings.rate));
    let mut memory = Memory::fill(&settings);
    let (mut last, mut reported, mut seq) = (Instant::now(), Instant::now(), 0);
    loop {
        let elapsed = last.elapsed().min(CATCH_UP).as_micros() as u64;
        last = Instant::now();
        for _ in 0..settings.rate * elapsed / 1_000_000 {
            memory.rewrite(settings.bytes);
        }
        for _ in 0..settings.check * elapsed / 1_000_000 {
            memory.check_next();
        }
        if reported.elapsed() >= REPORT {
            reported = Instant::now();
            say(&memory.report(seq));
            seq += 1;
        }
        std::thread::sleep(TICK.saturating_sub(last.elapsed()));
    }
}

/// One line to the console. The kernel kills a machine whose init dies, so a failed write is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
