//! A long line between two network namespaces. This kernel may have no netem, so the line is a program: it reads packets
//! from one TUN device and writes them to another, later, fewer, or not at all.
//!
//! ```text
//! namespace of PID_A          namespace of this program          namespace of PID_B
//!   dwcp-a (TUN) ───────────── reads, paces, delays ───────────── dwcp-b (TUN)
//! ```
//!
//! `dwcp-wan PID_A PID_B` makes the devices, moves one into the network namespace of each process, and says `ready`.
//! Then it obeys lines on its standard input, answering each with `ok`, or `error: why`, until that closes:
//!
//! ```text
//! set DIRECTION rate=BITS delay=MICROS loss=PPM reorder=PPM queue=BYTES     any of them; rate 0 is unlimited
//! cut DIRECTION                                                 packets vanish, those under way too
//! mend DIRECTION
//! count                                                         answers ok DELIVERED_AB DROPPED_AB BYTES_AB DELIVERED_BA DROPPED_BA BYTES_BA
//! ```
//!
//! DIRECTION is `ab`, `ba` or `both`. Only the laboratory runs it: in a namespace of its own, as root.

mod line;
mod tun;

use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use line::Line;

/// Larger than any packet of a device whose MTU is at most 9000.
const PACKET: usize = 16 << 10;

/// One direction's line, shared by the threads that feed and empty it and by the commands.
type Shared = Arc<Mutex<Line>>;

fn main() -> Result<()> {
    let pids: Vec<String> = std::env::args().skip(1).collect();
    let [pid_a, pid_b] = pids.as_slice() else { bail!("usage: dwcp-wan PID_A PID_B") };
    let a = tun::create("dwcp-a")?;
    let b = tun::create("dwcp-b")?;
    give_away("dwcp-a", pid_a)?;
    give_away("dwcp-b", pid_b)?;
    let ab = direction(&a, &b, 1)?;
    let ba = direction(&b, &a, 2)?;
    println!("ready");
    for command in std::io::stdin().lock().lines() {
        match obey(&command?, &ab, &ba) {
            Ok(answer) => println!("ok{answer}"),
            Err(why) => println!("error: {why:#}"),
        }
    }
    Ok(())
}

/// Moves a device into the network namespace of another process. The file that feeds it stays here.
fn give_away(device: &str, pid: &str) -> Result<()> {
    let moved =
        Command::new("ip").args(["link", "set", "dev", device, "netns", pid]).status().context("run ip")?;
    ensure!(moved.success(), "ip could not move {device} to the namespace of process {pid}");
    Ok(())
}

/// Starts one direction's threads: one that takes packets, one for each way that they go. They end with the process.
fn direction(from: &File, to: &File, seed: u64) -> Result<Shared> {
    let line = Arc::new(Mutex::new(Line::new(seed)));
    let (from, to) = (from.try_clone()?, to.try_clone()?);
    // What it holds is bounded by the line's own queue, in bytes.
    let (straight, on_the_straight) = channel();
    let (longer, on_the_longer) = channel();
    let entrance = Arc::clone(&line);
    std::thread::spawn(move || take(from, &entrance, &straight, &longer));
    for receiver in [on_the_straight, on_the_longer] {
        let (to, exit) = (to.try_clone()?, Arc::clone(&line));
        std::thread::spawn(move || deliver(to, &exit, &receiver));
    }
    Ok(line)
}

/// A packet and when it arrives.
type Sent = (Instant, Vec<u8>);

fn take(mut from: File, line: &Shared, straight: &Sender<Sent>, longer: &Sender<Sent>) {
    let mut packet = vec![0; PACKET];
    loop {
        // A device without an address or that is down gives errors for a while.
        let Ok(length) = from.read(&mut packet) else {
            std::thread::sleep(line::PATIENCE);
            continue;
        };
        let arrival = lock(line).offer(Instant::now(), length);
        if let Some(arrival) = arrival
            && let way = if arrival.detour { longer } else { straight }
            && way.send((arrival.at, packet[..length].to_vec())).is_err()
        {
            return;
        }
    }
}

fn deliver(mut to: File, line: &Shared, from: &Receiver<Sent>) {
    for (arrival, packet) in from {
        std::thread::sleep(arrival.saturating_duration_since(Instant::now()));
        if lock(line).arrive(packet.len()) {
            // As on any line: a packet that cannot be delivered is lost.
            let _ = to.write_all(&packet);
        }
    }
}

fn obey(command: &str, ab: &Shared, ba: &Shared) -> Result<String> {
    let mut words = command.split_whitespace();
    let verb = words.next().unwrap_or_default();
    if verb == "count" {
        let count = |line: &Shared| {
            let line = lock(line);
            format!(" {} {} {}", line.delivered(), line.dropped(), line.delivered_bytes())
        };
        return Ok(count(ab) + &count(ba));
    }
    let lines: &[&Shared] = match words.next() {
        Some("ab") => &[ab],
        Some("ba") => &[ba],
        Some("both") => &[ab, ba],
        other => bail!("no direction {other:?}"),
    };
    let settings: Vec<&str> = words.collect();
    for line in lines {
        let mut line = lock(line);
        match verb {
            "cut" => line.cut(true),
            "mend" => line.cut(false),
            "set" => settings.iter().try_for_each(|setting| line.set(setting))?,
            _ => bail!("no command {verb:?}"),
        }
    }
    Ok(String::new())
}

fn lock(line: &Shared) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}
