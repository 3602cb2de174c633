//! Against real processes: this test program, run again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod kid;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kid::Kid;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::inject::{InjectError, by_thread, userfaultfd_in};
use super::{TrackError, Tracker};

const PAGE: u64 = 4096;
const LIMIT: Duration = Duration::from_secs(30);
/// The step at which an injector dies, see `reached`.
pub(super) const DIE_AT: &str = "DWCP_TEST_DIE_AT";
/// The process into which an injector injects.
const INTO: &str = "DWCP_TEST_INTO";

#[test]
#[ignore = "what other tests run as another process"]
fn kid_itself() {
    kid::run();
}

/// Injects for ever; says so after the first time.
#[test]
#[ignore = "what other tests run as another process"]
fn injector_itself() {
    let into = std::env::var(INTO).expect("only for other tests");
    let mut tids = into.split(' ').map(|tid| tid.parse::<i32>().unwrap());
    let pid = tids.next().unwrap();
    let tids: Vec<i32> = tids.collect();
    let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    for tid in tids.iter().cycle() {
        by_thread(pid, pidfd.as_fd(), Some(*tid)).unwrap();
        println!("> injected");
    }
}

struct Injector(Child);

impl Injector {
    fn start(kid: &Kid, die_at: &str, tids: &[i32]) -> Self {
        let into: Vec<_> =
            std::iter::once(kid.pid()).chain(tids.iter().copied()).map(|n| n.to_string()).collect();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["direct::tests::injector_itself", "--exact", "--ignored", "--nocapture"])
            .env(DIE_AT, die_at)
            .env(INTO, into.join(" "))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Injector(process)
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pages(base: u64, pages: Range<u64>) -> Range<u64> {
    base + pages.start * PAGE..base + pages.end * PAGE
}

/// Waits for so short that a sleep would take far longer.
fn spin(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        std::hint::spin_loop();
    }
}

#[test]
fn written_pages_are_told_exactly_and_once() {
    let mut kid = Kid::start("plain", 64);
    for base in [kid.shared, kid.private] {
        let memory = if base == kid.shared { "shared" } else { "private" };
        kid.do_(&format!("write {memory} 0 1 2 3 4 5 6 7"));
        let mut tracker = Tracker::begin(kid.pid(), kid.pidfd.as_fd(), vec![pages(base, 0..64)]).unwrap();
        let first = tracker.written().unwrap();
        assert!(first.iter().any(|range| range.contains(&base)), "{first:x?}");
        assert_eq!(tracker.written().unwrap(), []);
        kid.do_(&format!("write {memory} 1 3 4 63"));
        kid.do_(&format!("look {memory} 5 6"));
        let expected = [pages(base, 1..2), pages(base, 3..5), pages(base, 63..64)];
        assert_eq!(tracker.written().unwrap(), expected);
        assert_eq!(tracker.written().unwrap(), []);
        // By the kernel.
        kid.do_(&format!("receive {memory} 7"));
        assert_eq!(tracker.written().unwrap(), [pages(base, 7..8)]);
        drop(tracker);
        // Nothing stays behind: another one begins from the beginning.
        let mut tracker = Tracker::begin(kid.pid(), kid.pidfd.as_fd(), vec![pages(base, 0..64)]).unwrap();
        assert!(tracker.written().unwrap().contains(&pages(base, 0..64)));
    }
    kid.is_healthy();
}

#[test]
fn two_ranges_and_more_regions_than_fit_one_answer() {
    const PAGES: u64 = 10_000;
    let mut kid = Kid::start("plain", PAGES);
    let ranges = vec![pages(kid.private, 0..PAGES), pages(kid.shared, 0..PAGES)];
    let mut tracker = Tracker::begin(kid.pid(), kid.pidfd.as_fd(), ranges).unwrap();
    let every: Vec<_> = (0..PAGES).map(|page| page.to_string()).collect();
    kid.do_(&format!("write shared {}", every.join(" ")));
    tracker.written().unwrap();
    let odd: Vec<_> = (1..PAGES).step_by(2).map(|page| page.to_string()).collect();
    kid.do_(&format!("write shared {}", odd.join(" ")));
    kid.do_("write private 9");
    let mut expected: Vec<_> = (1..PAGES).step_by(2).map(|page| pages(kid.shared, page..page + 1)).collect();
    expected.push(pages(kid.private, 9..10));
    expected.sort_by_key(|range| range.start);
    assert_eq!(tracker.written().unwrap(), expected);
    assert_eq!(tracker.written().unwrap(), []);
}

/// A copy that is renewed by what looks tell is right once the last look was taken at rest.
#[test]
fn no_write_is_missed_by_looks_in_the_midst_of_writes() {
    const PAGES: u64 = 4096;
    let mut kid = Kid::start("plain", PAGES);
    let all = pages(kid.shared, 0..PAGES);
    let mut tracker = Tracker::begin(kid.pid(), kid.pidfd.as_fd(), vec![all.clone()]).unwrap();
    let memory = File::open(format!("/proc/{}/mem", kid.pid())).unwrap();
    let count = |page: u64| {
        let mut count = [0; 8];
        memory.read_exact_at(&mut count, all.start + page * PAGE).unwrap();
        u64::from_le_bytes(count)
    };
    let mut copy = vec![0; PAGES as usize];
    tracker.written().unwrap();
    for round in 0..30 {
        kid.do_("scribble");
        for last in [false, false, true] {
            if last {
                kid.do_("rest");
            }
            for range in tracker.written().unwrap() {
                let first = (range.start - all.start) / PAGE;
                for page in first..first + (range.end - range.start) / PAGE {
                    copy[page as usize] = count(page);
                }
            }
        }
        let missed: Vec<_> = (0..PAGES).filter(|&page| copy[page as usize] != count(page)).collect();
        assert!(missed.is_empty(), "round {round}: pages {missed:?}");
    }
    assert!(copy.iter().sum::<u64>() > PAGES, "{copy:?}");
}

#[test]
fn what_cannot_be_tracked_is_refused_by_name() {
    let mut kid = Kid::start("plain", 4);
    let begin = |range| Tracker::begin(kid.pid(), kid.pidfd.as_fd(), vec![range]).unwrap_err();
    for range in [0..PAGE, pages(kid.shared, 0..1 << 30), kid.shared..kid.shared + 1, kid.shared..kid.shared]
    {
        let error = begin(range);
        assert!(matches!(error, TrackError::NotMapped { .. }), "{error}");
    }
    let _first = Tracker::begin(kid.pid(), kid.pidfd.as_fd(), vec![pages(kid.shared, 0..4)]).unwrap();
    let error = begin(pages(kid.shared, 0..4));
    assert!(matches!(error, TrackError::Taken { .. }), "{error}");
    kid.is_healthy();

    let mut kid = Kid::start("seccomp", 4);
    let error = userfaultfd_in(kid.pid(), kid.pidfd.as_fd()).unwrap_err();
    assert!(matches!(error, InjectError::Filtered { .. }), "{error}");
    kid.is_healthy();

    let mut kid = Kid::start("plain", 4);
    kid.stop(true);
    let error = userfaultfd_in(kid.pid(), kid.pidfd.as_fd()).unwrap_err();
    assert!(matches!(error, InjectError::Stopped { .. }), "{error}");
    kid.stop(false);
    kid.is_healthy();
    kid.kill();
    let error = userfaultfd_in(kid.pid(), kid.pidfd.as_fd()).unwrap_err();
    assert!(matches!(error, InjectError::Gone { .. }), "{error}");
}

#[test]
fn a_killed_process_is_an_error() {
    let mut kid = Kid::start("plain", 4);
    let mut tracker = Tracker::begin(kid.pid(), kid.pidfd.as_fd(), vec![pages(kid.shared, 0..4)]).unwrap();
    tracker.written().unwrap();
    kid.kill();
    assert!(tracker.written().is_err());
}

#[test]
fn a_process_lives_on_after_two_hundred_injections_into_each_thread() {
    let mut kid = Kid::start("plain", 4);
    let tids: Vec<_> = std::iter::once(kid.pid()).chain(kid.tids.iter().copied()).collect();
    for tid in tids {
        let begun = Instant::now();
        for _ in 0..200 {
            by_thread(kid.pid(), kid.pidfd.as_fd(), Some(tid)).unwrap();
        }
        eprintln!("{:?} an injection", begun.elapsed() / 200);
        kid.is_healthy();
    }
    kid.keeps_nothing();
}

/// Whatever the step, the thread goes on, and the next injector finds all in order.
#[test]
fn a_process_lives_on_when_its_injector_is_killed_at_any_step() {
    let mut kid = Kid::start("plain", 4);
    let steps = ["seized", "interrupted", "stopped", "written", "sent", "let go", "calling", "made", "taken"];
    for tid in kid.tids.clone().into_iter().chain([kid.pid()]) {
        for step in steps {
            let mut injector = Injector::start(&kid, step, &[tid]);
            let status = injector.0.wait().unwrap();
            assert_eq!(
                std::os::unix::process::ExitStatusExt::signal(&status),
                Some(9),
                "{step}: {}",
                kid::output(&mut injector.0)
            );
            kid.is_healthy();
        }
        by_thread(kid.pid(), kid.pidfd.as_fd(), Some(tid)).unwrap();
    }
    kid.keeps_nothing();
}

/// The same between the steps, wherever a kill happens to fall.
#[test]
fn a_process_lives_on_when_its_injector_is_killed_at_any_time() {
    let mut kid = Kid::start("plain", 4);
    let tids: Vec<_> = std::iter::once(kid.pid()).chain(kid.tids.iter().copied()).collect();
    for round in 0..60 {
        let mut injector = Injector::start(&kid, "", &tids);
        let mut lines = BufReader::new(injector.0.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("> injected")), "it injects");
        // Another moment each time; an injection takes some hundred microseconds.
        spin(Duration::from_micros(round * 37 % 2000));
        drop(injector);
        kid.is_healthy();
    }
    by_thread(kid.pid(), kid.pidfd.as_fd(), None).unwrap();
    kid.keeps_nothing();
}

/// Of signals that come while a thread is led, none is lost and none comes twice; nor when the injector dies with them.
#[test]
fn signals_find_their_handlers_in_the_midst_of_injections() {
    let mut kid = Kid::start("plain", 4);
    let mut sent = 0;
    for tid in kid.tids.clone() {
        let (pid, pidfd) = (kid.pid(), kid.pidfd.try_clone().unwrap());
        let turn = Arc::new(AtomicU64::new(0));
        let their_turn = turn.clone();
        let injector = std::thread::spawn(move || {
            (0..100).try_for_each(|_| {
                their_turn.fetch_add(1, Ordering::SeqCst);
                by_thread(pid, pidfd.as_fd(), Some(tid)).map(|_| ())
            })
        });
        // A few for each injection: the thread stops several times for each, and would do nothing else if they never ended.
        let mut seen = 0;
        while !injector.is_finished() {
            let now = turn.load(Ordering::SeqCst);
            if now == seen {
                std::thread::yield_now();
                continue;
            }
            seen = now;
            spin(Duration::from_micros(now * 37 % 400));
            for _ in 0..now % 4 {
                kid.signal(tid);
                sent += 1;
            }
        }
        kid.do_(&format!("handled {sent}"));
        injector.join().unwrap().unwrap();
        kid.is_healthy();
    }
    for round in 0..20 {
        let tid = kid.tids[round % kid.tids.len()];
        let mut injector = Injector::start(&kid, "", &[tid]);
        let mut lines = BufReader::new(injector.0.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("> injected")), "it injects");
        for _ in 0..100 + round * 7 {
            kid.signal(tid);
            sent += 1;
        }
        drop(injector);
        kid.is_healthy();
        kid.do_(&format!("handled {sent}"));
    }
}

#[test]
fn a_thread_that_does_not_stop_is_given_up_and_others_are_not_kept() {
    let mut kid = Kid::start("stuck", 4);
    let stuck = kid.tids[3];
    let error = by_thread(kid.pid(), kid.pidfd.as_fd(), Some(stuck)).unwrap_err();
    assert!(matches!(error, InjectError::Busy { .. }), "{error}");
    by_thread(kid.pid(), kid.pidfd.as_fd(), None).unwrap();
    kid.is_healthy();
    kid.do_("release");
    kid.is_healthy();
    by_thread(kid.pid(), kid.pidfd.as_fd(), Some(stuck)).unwrap();
    kid.is_healthy();
}

#[test]
fn a_process_that_is_killed_meanwhile_is_an_error() {
    for round in 0..20 {
        let mut kid = Kid::start("plain", 4);
        let (pid, tid) = (kid.pid(), kid.tids[round % 4]);
        let pidfd = kid.pidfd.try_clone().unwrap();
        let injector = std::thread::spawn(move || {
            loop {
                if let Err(error) = by_thread(pid, pidfd.as_fd(), Some(tid)) {
                    return error;
                }
            }
        });
        spin(Duration::from_micros(round as u64 * 337));
        kid.kill_only();
        let error = injector.join().unwrap();
        assert!(matches!(error, InjectError::Gone { .. }), "{error:?}");
        kid.kill();
    }
}
