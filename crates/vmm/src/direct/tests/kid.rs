//! A process to be tracked: this test program, run again. Its side (`run`) has memory, threads that check themselves, and obeys
//! commands; the tests' side ([`Kid`]) starts it and kills it with the value.
#![allow(unsafe_code)]

use std::arch::asm;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::thread::gettid;

use super::{LIMIT, PAGE};

/// Set in a kid: what is special about it.
const KIND: &str = "DWCP_TEST_KID";
/// Signals that were handled.
static HANDLED: AtomicU64 = AtomicU64::new(0);
/// The end of a pipe that keeps a stuck thread stuck.
static STUCK_END: AtomicI32 = AtomicI32::new(-1);
/// How long its poll(2) waits.
const POLLED: Duration = Duration::from_millis(5);

pub(super) struct Kid {
    process: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
    pub(super) pidfd: OwnedFd,
    pub(super) shared: u64,
    pub(super) private: u64,
    /// Threads: one each that waits in poll(2), waits in read(2), computes, and waits for a message.
    pub(super) tids: Vec<i32>,
}

impl Kid {
    /// `pages` is how many each of its two memories has. The kind `seccomp` has a filter that allows everything.
    pub(super) fn start(kind: &str, pages: u64) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["direct::tests::kid_itself", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env(KIND, format!("{kind} {pages}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pidfd = pidfd_open(Pid::from_raw(process.id() as i32).unwrap(), PidfdFlags::empty()).unwrap();
        let (stdin, stdout) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The harness talks too, and begins the line on which the first answer stands.
                if let Some((_, answer)) = line.split_once("> ") {
                    let _ = sender.send(answer.to_owned());
                }
            }
        });
        let mut kid = Kid { process, stdin, answers, pidfd, shared: 0, private: 0, tids: Vec::new() };
        let ready = kid.answer();
        let numbers: Vec<u64> = ready.split(' ').map(|number| number.parse().unwrap()).collect();
        (kid.shared, kid.private) = (numbers[0], numbers[1]);
        kid.tids = numbers[2..].iter().map(|&tid| tid as i32).collect();
        kid
    }

    pub(super) fn pid(&self) -> i32 {
        self.process.id() as i32
    }

    /// Lets it do something, and waits until it has.
    pub(super) fn do_(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
        assert_eq!(self.answer(), "done", "{command}");
    }

    /// All its threads still run, and found nothing wrong with themselves.
    pub(super) fn is_healthy(&mut self) {
        self.do_("check");
    }

    pub(super) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Sends a thread a signal that has a handler, and of which none is lost (signal(7), real-time signals).
    pub(super) fn signal(&self, tid: i32) {
        // SAFETY: a plain system call.
        assert_eq!(unsafe { libc::syscall(libc::SYS_tgkill, self.pid(), tid, libc::SIGRTMIN()) }, 0);
    }

    /// Stops it, or lets it go on.
    pub(super) fn stop(&self, stop: bool) {
        let signal = if stop { Signal::STOP } else { Signal::CONT };
        kill_process(Pid::from_raw(self.pid()).unwrap(), signal).unwrap();
    }

    /// Kills it, and leaves it a zombie.
    pub(super) fn kill_only(&self) {
        kill_process(Pid::from_raw(self.pid()).unwrap(), Signal::KILL).unwrap();
    }

    /// Waits until it has no userfaultfd open: the thread that made one closes it as soon as it runs again.
    pub(super) fn keeps_nothing(&self) {
        let begun = Instant::now();
        let is_one = |file: std::io::Result<std::fs::DirEntry>| {
            let target = file.and_then(|file| std::fs::read_link(file.path()));
            target.is_ok_and(|target| target.to_string_lossy().contains("userfaultfd"))
        };
        while std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().any(is_one) {
            assert!(begun.elapsed() < LIMIT, "a userfaultfd is left open");
            std::thread::yield_now();
        }
    }

    fn answer(&self) -> String {
        self.answers.recv_timeout(LIMIT).expect("the kid answers")
    }
}

impl Drop for Kid {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The kid's side. Ends with its stdin.
pub(super) fn run() {
    let kind = std::env::var(KIND).expect("only for other tests");
    let (kind, pages) = kind.split_once(' ').unwrap();
    let len = pages.parse::<usize>().unwrap() * PAGE as usize;
    // SAFETY: plain system calls; nothing here keeps what they refer to.
    let file = unsafe {
        libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY);
        OwnedFd::from_raw_fd(libc::memfd_create(c"kid".as_ptr(), libc::MFD_CLOEXEC))
    };
    rustix::fs::ftruncate(&file, len as u64).unwrap();
    let memories =
        [map(len, libc::MAP_SHARED, file.as_raw_fd()), map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)];
    if kind == "seccomp" {
        filter();
    }
    handle();
    let (sleeper, release) = sleeping(kind == "stuck");
    let mut release = Some(release);
    let mut scribbler = None;
    let workers =
        [Worker::start(polling), Worker::start(reading()), Worker::start(computing), Worker::start(sleeper)];
    let tids: Vec<_> = workers.iter().map(|worker| worker.tid.to_string()).collect();
    println!("> {} {} {}", memories[0], memories[1], tids.join(" "));
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let place = |page: &str| {
            let page: usize = page.parse().unwrap();
            assert!(page < len / PAGE as usize);
            (memories[usize::from(words[1] == "private")] as usize + page * PAGE as usize) as *mut u8
        };
        match words[0] {
            // SAFETY: `place` lies in a mapping that stays until the process ends, and no other thread uses.
            "write" => words[2..].iter().for_each(|page| unsafe { place(page).write_volatile(1) }),
            // SAFETY: the same.
            "look" => words[2..].iter().for_each(|page| unsafe {
                place(page).read_volatile();
            }),
            "receive" => {
                let (from, to) = std::io::pipe().unwrap();
                rustix::io::write(to, b"kernel").unwrap();
                // SAFETY: the same; the kernel writes 6 bytes.
                assert_eq!(unsafe { libc::read(from.as_raw_fd(), place(words[2]).cast(), 6) }, 6);
            }
            "scribble" => scribbler = Some(Scribbler::start(memories[0], len)),
            "rest" => drop(scribbler.take()),
            "check" => workers[..if release.is_some() && kind == "stuck" { 3 } else { 4 }]
                .iter()
                .for_each(Worker::check),
            "release" => release = None,
            "handled" => {
                let (expected, begun) = (words[1].parse::<u64>().unwrap(), Instant::now());
                while HANDLED.load(Ordering::SeqCst) != expected {
                    let handled = HANDLED.load(Ordering::SeqCst);
                    assert!(begun.elapsed() < LIMIT, "{handled} of {expected} signals");
                    std::thread::yield_now();
                }
            }
            other => panic!("{other}"),
        }
        println!("> done");
    }
    std::process::exit(0);
}

fn map(len: usize, flags: i32, file: i32) -> u64 {
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let place =
        unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, file, 0) };
    assert_ne!(place, libc::MAP_FAILED);
    // SAFETY: it is our own mapping. Else how much a first write touches would be the machine's choice.
    assert_eq!(unsafe { libc::madvise(place, len, libc::MADV_NOHUGEPAGE) }, 0);
    place as u64
}

/// A thread that counts up in every other page of a memory, in no order, until this is dropped.
struct Scribbler {
    goes_on: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Scribbler {
    fn start(memory: u64, len: usize) -> Self {
        let goes_on = Arc::new(AtomicBool::new(true));
        let theirs = goes_on.clone();
        let pages = len as u64 / PAGE / 2;
        let thread = std::thread::spawn(move || {
            let mut random = 0x9e37_79b9_7f4a_7c15_u64;
            while theirs.load(Ordering::SeqCst) {
                // xorshift64 (Marsaglia, 2003).
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let place = (memory + random % pages * 2 * PAGE) as *mut u64;
                // SAFETY: within a mapping that stays until the process ends, and no other thread uses meanwhile.
                unsafe { place.write_volatile(place.read_volatile() + 1) };
            }
        });
        Scribbler { goes_on, thread: Some(thread) }
    }
}

impl Drop for Scribbler {
    fn drop(&mut self) {
        self.goes_on.store(false, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Every system call is allowed, by a filter.
fn filter() {
    const RETURN: u16 = 0x06;
    let mut allow = libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let program = libc::sock_fprog { len: 1, filter: &mut allow };
    // SAFETY: the kernel copies the program during the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        // For all threads.
        let (set, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_TSYNC);
        assert_eq!(libc::syscall(libc::SYS_seccomp, set, flags, &program), 0);
    }
}

/// Counts signals. The system calls that they interrupt are restarted, but for poll(2), which never is after a handler.
fn handle() {
    extern "C" fn handler(_: libc::c_int) {
        HANDLED.fetch_add(1, Ordering::SeqCst);
        // A handler may do system calls; a tracer sees them.
        let _ = rustix::process::getppid();
    }
    let action = libc::sigaction {
        sa_sigaction: handler as *const () as usize,
        // SAFETY: an empty set is all zeroes.
        sa_mask: unsafe { std::mem::zeroed() },
        sa_flags: libc::SA_RESTART,
        sa_restorer: None,
    };
    // SAFETY: the handler only adds to an atomic and does a system call.
    assert_eq!(unsafe { libc::sigaction(libc::SIGRTMIN(), &action, ptr::null_mut()) }, 0);
}

/// A thread that does the same for ever, and says whether it still comes out right.
struct Worker {
    tid: i32,
    turns: Arc<AtomicU64>,
    is_wrong: Arc<AtomicBool>,
}

impl Worker {
    fn start(mut turn: impl FnMut() -> bool + Send + 'static) -> Self {
        let (turns, is_wrong) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (their_turns, their_wrong) = (turns.clone(), is_wrong.clone());
        let (sender, tid) = channel();
        std::thread::spawn(move || {
            sender.send(gettid().as_raw_nonzero().get()).unwrap();
            loop {
                if !turn() {
                    their_wrong.store(true, Ordering::SeqCst);
                }
                their_turns.fetch_add(1, Ordering::SeqCst);
            }
        });
        Worker { tid: tid.recv().unwrap(), turns, is_wrong }
    }

    fn check(&self) {
        let (before, begun) = (self.turns.load(Ordering::SeqCst), Instant::now());
        while self.turns.load(Ordering::SeqCst) < before + 2 {
            assert!(begun.elapsed() < LIMIT, "thread {} stands still", self.tid);
            std::thread::yield_now();
        }
        assert!(!self.is_wrong.load(Ordering::SeqCst), "thread {} went wrong", self.tid);
    }
}

/// A poll(2) that is interrupted is restarted for the rest of its time, and says EINTR only after a handler.
fn polling() -> bool {
    let begun = Instant::now();
    // SAFETY: no descriptors are passed.
    let ready = unsafe { libc::poll(ptr::null_mut(), 0, POLLED.as_millis() as i32) };
    (ready == 0 && begun.elapsed() >= POLLED) || (ready < 0 && HANDLED.load(Ordering::SeqCst) > 0)
}

/// What is written to a pipe comes out of it in order, by reads that mostly have to wait.
fn reading() -> impl FnMut() -> bool {
    let (from, to) = std::io::pipe().unwrap();
    std::thread::spawn(move || {
        for number in 0_u64.. {
            std::thread::sleep(Duration::from_micros(200));
            rustix::io::write(&to, &number.to_le_bytes()).unwrap();
        }
    });
    let mut expected = 0_u64;
    move || {
        let mut number = [0; 8];
        // Not through std, which would read again after EINTR.
        let read = rustix::io::read(from.as_fd(), &mut number);
        let is_right = read == Ok(8) && u64::from_le_bytes(number) == expected;
        expected += 1;
        is_right
    }
}

/// Waits in a way that only a kill ends, first of all, until the other value is dropped, if it is to be `stuck`; and then on a futex.
fn sleeping(stuck: bool) -> (impl FnMut() -> bool, std::io::PipeWriter) {
    let (mut from, to) = std::io::pipe().unwrap();
    let mut stuck = stuck;
    let turn = move || {
        if std::mem::take(&mut stuck) {
            // SAFETY: like fork(2), but that the thread waits until the new process ends. That one only reads and ends; it has no
            // other end of the pipe, since that would keep it open.
            unsafe {
                let flags = libc::CLONE_VFORK | libc::SIGCHLD;
                if libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) == 0 {
                    libc::close(STUCK_END.load(Ordering::SeqCst));
                    let _ = from.read(&mut [0]);
                    libc::_exit(0);
                }
            }
        }
        let begun = Instant::now();
        std::thread::park_timeout(POLLED);
        begun.elapsed() >= POLLED
    };
    STUCK_END.store(to.as_raw_fd(), Ordering::SeqCst);
    (turn, to)
}

/// Registers, flags and what lies right below the stack pointer are as they were left.
fn computing() -> bool {
    const TURNS: u64 = 1_000_000;
    let (a, b, c, d, turns, flags, left, right): (u64, u64, u64, u64, u64, u64, u64, u64);
    // SAFETY: of memory only the red zone is used, which is nobody's across inline assembly, and the registers are declared.
    unsafe {
        asm!(
            "mov [rsp - 8], rax",
            "mov [rsp - 128], rdi",
            "stc",
            "2: lea r10, [r10 + 1]",
            "loop 2b", // counts rcx down and leaves the flags alone
            "setc r9b",
            "mov r8, [rsp - 8]",
            "mov rdx, [rsp - 128]",
            inout("rax") 0x1111_2222_3333_4444_u64 => a,
            inout("rdi") 0x5555_6666_7777_8888_u64 => b,
            inout("r11") 0x9999_aaaa_bbbb_cccc_u64 => c,
            inout("rcx") TURNS => d,
            inout("r10") 0_u64 => turns,
            inout("r9") 0_u64 => flags,
            out("r8") left,
            out("rdx") right,
        );
        (a, b, c, d, turns, flags)
            == (0x1111_2222_3333_4444, 0x5555_6666_7777_8888, 0x9999_aaaa_bbbb_cccc, 0, TURNS, 1)
            && (left, right) == (a, b)
    }
}

/// The rest of a process's output, for a failed one.
pub(super) fn output(process: &mut Child) -> String {
    let mut text = String::new();
    if let Some(mut stdout) = process.stdout.take() {
        let _ = stdout.read_to_string(&mut text);
    }
    text
}
