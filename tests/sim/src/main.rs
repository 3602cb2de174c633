//! A simulated VMM as a process: `dwcp-sim QMP LOG running|incoming GUEST`, where `QMP` is the socket that an agent
//! drives, `LOG` the file into which each change of the run state goes, and `GUEST` the JSON of a
//! [`GuestSpec`].
//!
//! It says `ready`, then answers each line of its standard input with one of its own, `ok ...` or `error ...`:
//!
//! | command | answer |
//! |---|---|
//! | `state` | the run state, the guest's steps since it booted and its RAM's checksum, or `-` for both without a guest |
//! | `step N` | the guest, if it runs, does N steps |
//! | `fault NAME ARGUMENT` | something will go wrong: see [`fault`] |
//! | `heal` | all faults are taken back |
//!
//! A line of the log is the monotonic clock in nanoseconds, which all processes share, and the state. The process ends
//! with its VMM, with status 1, and with its standard input.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use dwcp_vmm::sim::{Fault, GuestSpec, SimVmm};
use tokio::io::{AsyncBufReadExt, BufReader, stdin};

/// Status of a process whose VMM died.
const DIED: i32 = 1;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [qmp, log, role, guest] = &arguments[..] else {
        bail!("usage: dwcp-sim QMP LOG running|incoming GUEST")
    };
    let guest: GuestSpec = serde_json::from_str(guest).context("GUEST")?;
    let vmm = match role.as_str() {
        "running" => SimVmm::running(Path::new(qmp), guest)?,
        "incoming" => SimVmm::incoming(Path::new(qmp), guest)?,
        _ => bail!("\"{role}\" is neither running nor incoming"),
    };
    let log = File::options().create(true).append(true).open(log).context("LOG")?;
    println!("ready");
    tokio::select! {
        biased;
        () = vmm.died() => std::process::exit(DIED),
        outcome = record(&vmm, log) => outcome,
        outcome = obey(&vmm) => outcome,
    }
}

/// Writes down each state that the VMM enters.
async fn record(vmm: &SimVmm, mut log: File) -> Result<()> {
    let mut states = vmm.states();
    states.mark_changed();
    while states.changed().await.is_ok() {
        states.mark_unchanged();
        let entered = vmm.take_history();
        let lines = entered.iter().map(|(at, state)| format!("{} {}\n", at.as_nanos(), state.as_str()));
        // In one write: a reader never sees half of a line.
        log.write_all(lines.collect::<String>().as_bytes())?;
    }
    Ok(())
}

async fn obey(vmm: &SimVmm) -> Result<()> {
    let mut commands = BufReader::new(stdin()).lines();
    while let Some(command) = commands.next_line().await? {
        match answer(vmm, &command) {
            Ok(answer) => println!("ok {answer}"),
            Err(error) => println!("error {error:#}"),
        }
    }
    Ok(())
}

fn answer(vmm: &SimVmm, command: &str) -> Result<String> {
    let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
    match verb {
        "state" => {
            let guest = vmm.guest();
            let (steps, checksum) = match &guest {
                Some(guest) => (guest.steps().to_string(), format!("{:016x}", guest.checksum())),
                None => ("-".into(), "-".into()),
            };
            Ok(format!("{} {steps} {checksum}", vmm.run_state().as_str()))
        }
        "step" => {
            vmm.step(rest.parse()?);
            Ok(String::new())
        }
        "fault" => {
            vmm.inject(fault(rest)?);
            Ok(String::new())
        }
        "heal" => {
            vmm.heal();
            Ok(String::new())
        }
        _ => bail!("unknown command {verb}"),
    }
}

/// `fail-at`, `die-at` and `stall-at` with an offset in the stream; `die-on`, `hang` and `refuse` with a QMP command;
/// `say` with a command and the line to say before its answer.
fn fault(text: &str) -> Result<Fault> {
    let (name, argument) = text.split_once(' ').context("a fault needs an argument")?;
    Ok(match name {
        "fail-at" => Fault::FailAt(argument.parse()?),
        "die-at" => Fault::DieAt(argument.parse()?),
        "stall-at" => Fault::StallAt(argument.parse()?),
        "die-on" => Fault::DieOn(argument.into()),
        "hang" => Fault::Hang(argument.into()),
        "refuse" => Fault::Refuse(argument.into()),
        "say" => {
            let (command, line) = argument.split_once(' ').context("say what?")?;
            Fault::Say(command.into(), line.into())
        }
        _ => bail!("unknown fault {name}"),
    })
}
