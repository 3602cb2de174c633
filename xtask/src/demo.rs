//! `cargo xtask demo`: a live guest goes from one agent to another and back, and checks its memory all the while.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dwcp_tests::{AgentConfig, GuestLoad, QemuSpec, QemuVersion, Role, Scene, Watcher};
use serde_json::Value;

use crate::setup::setup;
use crate::test::build_programs;

/// How long the guest is followed at its new place.
const AFTER: Duration = Duration::from_secs(5);
/// Between two lines of progress where there is no terminal to rewrite one.
const PLAIN: Duration = Duration::from_secs(2);

/// One line of the table.
struct Row {
    way: String,
    path: String,
    result: Value,
    guest: String,
}

/// Shows the main job on two real QEMUs.
pub(crate) fn demo() -> Result<()> {
    println!("building dwcpd and dwcpctl");
    build_programs()?;
    let kit = setup()?;

    println!("starting a guest of 512 MiB that rewrites 2000 pages a second, and two agents");
    let mut spec = QemuSpec::new(QemuVersion::V10_0, Role::Source);
    spec.ram_mib = 512;
    spec.load = GuestLoad { mib: 256, ..GuestLoad::default() };
    let scene = Scene::with(&kit, spec, AgentConfig::default(), AgentConfig::default())?;
    scene.from.guest_ok_for(Duration::from_secs(1))?;

    let mut rows = vec![migrate(&scene, "v1", &["--path", "v1"])?];
    let scene = scene.turn_round()?;
    rows.push(migrate(&scene, "v3 internet", &["--path", "v3", "--mode", "internet"])?);
    table(&rows)
}

/// Moves the guest from the scene's `a` to its `b`, and follows it there.
fn migrate(scene: &Scene, path: &str, arguments: &[&str]) -> Result<Row> {
    let way = format!("{} -> {}", scene.a.node(), scene.b.node());
    println!("{way} over {path}");
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;
    let mut shown = Shown::new();
    let result = scene.move_guest_watched(arguments, |line| shown.progress(line))?;
    shown.end();
    let seconds = AFTER.as_secs();
    println!("  arrived; the guest checks its memory for {seconds} s");
    let report = scene.to.guest_ok_for(AFTER)?;
    watcher.finish().context("who ran when")?;
    let guest = format!("alive, {} pages checked, {} wrong", report.checked, report.wrong);
    Ok(Row { way, path: path.to_owned(), result, guest })
}

/// One line that is rewritten on a terminal, or a line now and then elsewhere.
struct Shown {
    terminal: bool,
    last: Option<Instant>,
}

impl Shown {
    fn new() -> Self {
        Shown { terminal: std::io::stdout().is_terminal(), last: None }
    }

    /// Takes a line of `dwcpctl migrate --json`.
    fn progress(&mut self, line: &str) {
        let Ok(status) = serde_json::from_str::<Value>(line) else { return };
        if !self.terminal && self.last.is_some_and(|last| last.elapsed() < PLAIN) {
            return;
        }
        self.last = Some(Instant::now());
        let word = |key: &str| status[key].as_str().unwrap_or("-").to_owned();
        let percent = status["progress"]["fraction"].as_f64().unwrap_or_default() * 100.0;
        let text = format!("{:<12} {percent:>4.0} %  {}", word("status"), mb(&status["wire_bytes"]));
        if self.terminal {
            print!("\r  {text}\x1b[K");
            let _ = std::io::stdout().flush();
        } else {
            println!("  {text}");
        }
    }

    fn end(&self) {
        if self.terminal {
            println!();
        }
    }
}

fn table(rows: &[Row]) -> Result<()> {
    let head = ["way", "path", "seconds", "downtime", "raw", "wire", "saved", "guest"];
    let mut lines = vec![head.map(str::to_owned)];
    for Row { way, path, result, guest } in rows {
        let number = |key: &str| result[key].as_f64().with_context(|| format!("no \"{key}\" in {result}"));
        lines.push([
            way.clone(),
            path.clone(),
            format!("{:.2}", number("total_seconds")?),
            format!("{:.0} ms", number("downtime_ms")?),
            mb(&result["raw_bytes"]),
            mb(&result["wire_bytes"]),
            format!("{:.0} %", 100.0 * (1.0 - number("wire_bytes")? / number("raw_bytes")?.max(1.0))),
            guest.clone(),
        ]);
    }
    let widths: [usize; 8] =
        std::array::from_fn(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or(0));
    println!();
    for line in lines {
        let cells: Vec<String> =
            line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
    Ok(())
}

/// Bytes as MB with one decimal.
fn mb(bytes: &Value) -> String {
    format!("{:.1} MB", bytes.as_f64().unwrap_or_default() / 1e6)
}
