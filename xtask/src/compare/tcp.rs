//! What TCP and QUIC carry over a shaped line, by congestion control and number of connections: the reason for `[link] congestion`, for the
//! controller that QUIC has here, and for which of the two is used.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use dwcp_link::{
    Connection, Controller, DialOptions, Identity, ListenOptions, Listener, Peers, Reader, dial_quic,
};
use dwcp_proto::{NodeKey, NodeName, PeerKey};
use dwcp_tests::{End, Kit, LineProfile, Wan};
use rustix::net::sockopt::set_tcp_congestion;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use tokio::time::{sleep_until, timeout_at};

use super::machine;
use super::table::{Table, median};
use crate::run::root;
use crate::setup::setup;
use crate::test::build_programs;

const CONTROLS: [&str; 2] = ["cubic", "bbr"];
const STREAMS: [usize; 4] = [1, 2, 4, 8];
/// Bytes of one write or read.
const PIECE: usize = 64 << 10;

/// How much to measure.
#[derive(Args)]
pub(crate) struct Settings {
    /// Runs of each
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Seconds of each run; the second half counts
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Only lines whose name holds this word, and no document
    #[arg(long)]
    line: Option<String>,
}

fn lines() -> [(&'static str, LineProfile); 4] {
    let line = |mbit: u64, ms: u64, loss_ppm| LineProfile {
        loss_ppm,
        ..LineProfile::new(mbit * 1_000_000, Duration::from_millis(ms) / 2)
    };
    [
        ("200 Mbit/s, 20 ms", line(200, 20, 0)),
        ("200 Mbit/s, 20 ms, 0.1 % loss", line(200, 20, 1000)),
        ("100 Mbit/s, 100 ms", line(100, 100, 0)),
        ("100 Mbit/s, 100 ms, 0.5 % loss", line(100, 100, 5000)),
    ]
}

/// Runs the comparison and writes its table.
pub(crate) fn compare(settings: &Settings) -> Result<()> {
    let kit = setup()?;
    build_programs()?;
    let mut head = vec!["line, congestion control".to_owned()];
    head.extend(STREAMS.map(|n| if n == 1 { "1 connection".to_owned() } else { format!("{n} connections") }));
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    let chosen = |name: &str| settings.line.as_ref().is_none_or(|word| name.contains(word.as_str()));
    for (line, profile) in lines().into_iter().filter(|(name, _)| chosen(name)) {
        let Some(wan) = Wan::start_or_skip("compare tcp", profile)? else {
            bail!("no network namespaces here")
        };
        let time = Duration::from_secs(settings.seconds);
        let mut row = |name: String, carried: &dyn Fn(usize) -> Result<f64>| -> Result<()> {
            let mut cells = vec![format!("{line}, {name}")];
            for streams in STREAMS {
                let rates = (0..settings.runs).map(|_| carried(streams));
                let rates = rates.collect::<Result<Vec<f64>>>().with_context(|| cells[0].clone())?;
                cells.push(median(rates).map_or("-".into(), |rate| format!("{:.1}", rate * 8.0 / 1e6)));
            }
            println!("{}", cells.join("  "));
            table.line(cells);
            Ok(())
        };
        for control in CONTROLS {
            row(format!("TCP {control}"), &|streams| carried(&wan, control, streams, time))?;
        }
        for controller in Controller::ALL {
            let name = format!("QUIC {}", controller.name());
            row(name, &|streams| quic_carried(&wan, controller, streams, time))?;
        }
    }
    println!("\n{table}");
    if settings.line.is_none() {
        fs::write(root().join("docs/compare-tcp.md"), document(&kit, settings, &table)?)?;
    }
    Ok(())
}

fn document(kit: &Kit, settings: &Settings, table: &Table) -> Result<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let machine: String = machine::describe(kit, cores)?.iter().map(|line| format!("- {line}\n")).collect();
    Ok(format!(
        "# TCP and QUIC over long lines\n\n\
         Made by `cargo xtask compare tcp`: plain TCP connections, and QUIC connections as the agents make them, between two network \
         namespaces over a shaped line whose queue holds two round trips. QUIC's packets are encrypted by the same cores that shape the line. Mbit/s of payload in the second half of {} s, median of {} run(s). What is above the line's rate had waited in its queue. Others may have built on the machine meanwhile: \
         see the load.\n\n{machine}- day: {}\n- load: {:.1}\n\n{table}\n\
         A congestion control that takes every lost packet for a full link (cubic, the usual default) carries a fraction of a long line \
         that loses packets by chance, over TCP and QUIC alike, whatever the number of connections. BBR does not, and where nothing is lost TCP's is as good; QUIC's then carries up to a fifth less than the others. So data \
         connections in internet mode ask for BBR where the kernel has it (`[link] congestion`), the status says where it has not, and QUIC connections have \
         it always. QUIC pays where the kernel has no BBR to give, or where something between the nodes treats TCP badly: hence `[link] transport = \"auto\"` \
         measures both where TCP loses packets, and takes QUIC only where that carries 1.2 times as much.\n",
        settings.seconds,
        settings.runs,
        machine::today()?,
        machine::load()?,
    ))
}

/// Bytes a second that arrive in the second half of `time`.
fn carried(wan: &Wan, control: &str, streams: usize, time: Duration) -> Result<f64> {
    let listener = wan.within(End::B, || Ok(TcpListener::bind((End::B.address(), 0))?))?;
    let address = listener.local_addr()?;
    let mut pairs = Vec::new();
    for _ in 0..streams {
        let from = wan.within(End::A, || {
            let from = TcpStream::connect(address)?;
            set_tcp_congestion(&from, control)?;
            Ok(from)
        })?;
        pairs.push((from, listener.accept()?.0));
    }
    let begun = Instant::now();
    let late = std::thread::scope(|scope| {
        let mut readers = Vec::new();
        for (from, to) in &pairs {
            scope.spawn(move || {
                let piece = vec![7; PIECE];
                // Ends when the reader has seen enough.
                while (&*from).write_all(&piece).is_ok() {}
            });
            readers.push(scope.spawn(move || count(from, to, begun, time)));
        }
        let late =
            readers.into_iter().map(|reader| reader.join().map_err(|_| anyhow!("a reader panicked"))?);
        late.collect::<Result<Vec<u64>>>()
    })?;
    Ok(late.iter().sum::<u64>() as f64 / (time / 2).as_secs_f64())
}

/// Bytes that come in the second half of `time`; then the connection is ended.
fn count(from: &TcpStream, to: &TcpStream, begun: Instant, time: Duration) -> Result<u64> {
    let (mut to, mut piece, mut late) = (to, vec![0; PIECE], 0);
    to.set_read_timeout(Some(Duration::from_millis(100)))?;
    while begun.elapsed() < time {
        match to.read(&mut piece) {
            Ok(0) => break,
            Ok(read) if begun.elapsed() > time / 2 => late += read as u64,
            Ok(_) => {}
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
    Ok(late)
}

/// The same over QUIC connections, as the agents make them.
fn quic_carried(wan: &Wan, controller: Controller, streams: usize, time: Duration) -> Result<f64> {
    let runtime = Runtime::new()?;
    let (a, b) = (key("a")?, key("b")?);
    let of =
        |ours: &Arc<NodeKey>, theirs: PeerKey| Identity::new(ours.clone(), Arc::new(Peers::of([theirs])));
    let (as_a, as_b) = (of(&a, b.public())?, of(&b, a.public())?);
    // A socket belongs to the namespace of the thread that makes it, whoever uses it.
    let mut listener = wan.within(End::B, || {
        let options = ListenOptions { quic: true, ..ListenOptions::default() };
        Ok(runtime.block_on(Listener::bind((End::B.address(), 0).into(), &as_b, options))?)
    })?;
    let options = DialOptions { controller, ..DialOptions::default() };
    let dialled = (0..streams).map(|_| {
        wan.within(End::A, || {
            Ok(runtime.block_on(dial_quic(listener.local_addr(), &as_a, b.node(), &options))?)
        })
    });
    let dialled = dialled.collect::<Result<Vec<Connection>>>()?;
    runtime.block_on(async {
        let begun = tokio::time::Instant::now();
        let mut readers = Vec::new();
        let mut writers = Vec::new();
        for connection in dialled {
            let (reader, mut writer) = connection.into_split();
            writers.push(tokio::spawn(async move {
                let piece = vec![7; PIECE];
                // Ends when the reader has seen enough.
                while writer.write_all(&piece).await.is_ok() {}
                drop(reader);
            }));
        }
        for _ in 0..streams {
            let (reader, writer) = listener.accept().await.context("the listener is gone")?.into_split();
            readers.push(tokio::spawn(async move {
                let late = count_quic(reader, begun, time).await;
                drop(writer);
                late
            }));
        }
        let mut late = 0;
        for reader in readers {
            late += reader.await?;
        }
        writers.iter().for_each(tokio::task::JoinHandle::abort);
        Ok(late as f64 / (time / 2).as_secs_f64())
    })
}

/// Bytes that come in the second half of `time`; then the connection is ended.
async fn count_quic(mut reader: Reader, begun: tokio::time::Instant, time: Duration) -> u64 {
    reader.widen();
    let (mut piece, mut late) = (vec![0; PIECE], 0);
    while let Ok(Ok(read)) = timeout_at(begun + time, reader.read(&mut piece)).await {
        if read == 0 {
            break;
        }
        if begun.elapsed() > time / 2 {
            late += read as u64;
        }
    }
    sleep_until(begun + time).await;
    reader.gauge().cut();
    late
}

fn key(node: &str) -> Result<Arc<NodeKey>> {
    Ok(Arc::new(NodeKey::from_seed(NodeName::new(node)?, &[node.as_bytes()[0]; 32])))
}
