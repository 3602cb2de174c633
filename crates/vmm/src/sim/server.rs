//! The QMP server of a simulated VMM.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::migration::{self, Connection};
use super::stream::MACHINE;
use super::vmm::{Core, Fault, MAX_UNREAD, Machine};
use crate::qmp::{MigrationStatus, RunState};

/// Bytes of a command.
const MAX_COMMAND: usize = 64 << 10;

/// Serves one client after the other, as QEMU does.
pub(super) async fn serve(core: Arc<Core>, listener: UnixListener) {
    while let Ok((stream, _)) = listener.accept().await {
        // Ends with the client; another one may come.
        let _ = converse(&core, stream).await;
        core.machine().client = None;
    }
}

async fn converse(core: &Arc<Core>, stream: UnixStream) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let version = json!({ "qemu": { "major": 10, "minor": 0, "micro": 2 }, "package": "simulated" });
    let greeting = json!({ "QMP": { "version": version, "capabilities": ["oob"] } });
    write.write_all(format!("{greeting}\r\n").as_bytes()).await?;
    let (client, mut lines) = mpsc::channel(MAX_UNREAD);
    let mut client = Some(client);
    let mut commands = Vec::new();
    loop {
        tokio::select! {
            biased;
            line = lines.recv() => match line {
                Some(line) => write.write_all(format!("{line}\r\n").as_bytes()).await?,
                None => return Ok(()),
            },
            received = receive(read.as_ref()) => {
                let (bytes, descriptor) = received?;
                if bytes.is_empty() {
                    return Ok(());
                }
                if descriptor.is_some() {
                    core.machine().passed = descriptor;
                }
                commands.extend(bytes);
                while let Some(end) = commands.iter().position(|byte| *byte == b'\n') {
                    let command: Vec<u8> = commands.drain(..=end).collect();
                    // Events reach a client from its first command on; its own end of the channel is the machine's.
                    if let Some(client) = client.take() {
                        core.machine().client = Some(client);
                    }
                    if let Then::Quit = execute(core, &command).await {
                        while let Ok(line) = lines.try_recv() {
                            write.write_all(format!("{line}\r\n").as_bytes()).await?;
                        }
                        core.die();
                    }
                }
                if commands.len() >= MAX_COMMAND {
                    return Ok(());
                }
            },
        }
    }
}

/// The next bytes, none at the end, and a descriptor that came with them.
async fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let receive = || {
        let mut bytes = vec![0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        bytes.truncate(got.bytes);
        let mut descriptors = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        Ok((bytes, descriptors.next().and_then(|mut descriptors| descriptors.next())))
    };
    stream.async_io(Interest::READABLE, receive).await
}

async fn execute(core: &Arc<Core>, line: &[u8]) -> Then {
    let request: Value = serde_json::from_slice(line).unwrap_or_default();
    let command = request["execute"].as_str().unwrap_or_default().to_owned();
    let faults = core.machine().faults.clone();
    for fault in faults {
        match fault {
            Fault::DieOn(on) if on == command => {
                core.die();
                return std::future::pending().await;
            }
            Fault::Hang(on) if on == command => return std::future::pending().await,
            Fault::Say(on, line) if on == command => core.machine().say(line),
            Fault::Refuse(on) if on == command => {
                answer(core, &request, Err(("GenericError", "refused by the simulation".into())));
                return Then::Continue;
            }
            _ => {}
        }
    }
    let outcome = run(core, &command, &request["arguments"]);
    answer(core, &request, outcome);
    if command == "quit" { Then::Quit } else { Then::Continue }
}

enum Then {
    Continue,
    Quit,
}

type Outcome = Result<Value, (&'static str, String)>;

fn answer(core: &Core, request: &Value, outcome: Outcome) {
    let mut answer = match outcome {
        Ok(value) => json!({ "return": value }),
        Err((class, desc)) => json!({ "error": { "class": class, "desc": desc } }),
    };
    if let Some(id) = request.get("id") {
        answer["id"] = id.clone();
    }
    core.machine().say(answer.to_string());
}

fn run(core: &Arc<Core>, command: &str, arguments: &Value) -> Outcome {
    let refuse = |desc: &str| Err(("GenericError", desc.to_owned()));
    let machine = &mut *core.machine();
    Ok(match command {
        "qmp_capabilities" | "announce-self" | "query-name" => json!({}),
        "query-uuid" => json!({ "UUID": "00000000-0000-0000-0000-000000000000" }),
        "query-block" => json!([]),
        "query-status" => {
            json!({ "status": machine.state.as_str(), "running": machine.state == RunState::Running })
        }
        "query-memdev" => json!([{ "id": "pc.ram", "size": machine.spec.pages * 4096, "share": false }]),
        "query-cpus-fast" => json!([{ "qom-path": "/machine/cpu", "cpu-index": 0 }]),
        "qom-get" => match arguments["path"].as_str() {
            Some("/machine") => json!(format!("{MACHINE}-machine")),
            Some("/machine/cpu") => json!("sim-x86_64-cpu"),
            _ => return Err(("DeviceNotFound", "no such device".into())),
        },
        "human-monitor-command" => match arguments["command-line"].as_str() {
            Some("info ramblock") => json!(ramblock(machine)),
            _ => json!("unknown command\r\n"),
        },
        "query-migrate" => query_migrate(machine),
        "query-migrate-capabilities" => {
            let entry = |(name, state): (&String, &Value)| json!({ "capability": name, "state": state });
            machine.capabilities.iter().map(entry).collect()
        }
        "query-migrate-parameters" => Value::Object(machine.parameters.clone()),
        "migrate-set-capabilities" => {
            for change in arguments["capabilities"].as_array().into_iter().flatten() {
                let known = change["capability"].as_str().and_then(|name| machine.capabilities.get_mut(name));
                match known {
                    Some(state) => *state = change["state"].clone(),
                    None => return refuse("Parameter 'capability' does not accept this value"),
                }
            }
            json!({})
        }
        "migrate-set-parameters" => {
            for (name, value) in arguments.as_object().into_iter().flatten() {
                match machine.parameters.get_mut(name) {
                    Some(old) => *old = value.clone(),
                    None => return refuse(&format!("Parameter '{name}' is unexpected")),
                }
            }
            json!({})
        }
        "stop" => {
            machine.stop();
            json!({})
        }
        "cont" if machine.cont() => json!({}),
        "cont" => return refuse("the guest is stopped for a migration"),
        "quit" => {
            machine.emit("SHUTDOWN", json!({ "guest": false, "reason": "host-qmp-quit" }));
            json!({})
        }
        "getfd" => {
            let Some(descriptor) = machine.passed.take() else {
                return refuse("No file descriptor supplied via SCM_RIGHTS");
            };
            let name = arguments["fdname"].as_str().unwrap_or_default();
            machine.descriptors.insert(name.to_owned(), descriptor);
            json!({})
        }
        "closefd" => match machine.descriptors.remove(arguments["fdname"].as_str().unwrap_or_default()) {
            Some(_) => json!({}),
            None => return refuse("File descriptor not found"),
        },
        "migrate" => {
            let busy = machine.status.as_ref().is_some_and(|s| !s.is_final());
            match machine.state {
                _ if busy => return refuse("There's a migration process in progress"),
                RunState::InMigrate => return refuse("Guest is waiting for an incoming migration"),
                RunState::PostMigrate => {
                    return refuse("Can't migrate the vm that was paused due to previous migration");
                }
                _ => {}
            }
            let to = connection(machine, arguments)?;
            migration::begin(core, machine, to);
            json!({})
        }
        "migrate_cancel" => {
            if machine.status.as_ref().is_some_and(|status| !status.is_final()) && machine.guest.is_some() {
                machine.set_status(MigrationStatus::Cancelling);
                machine.cancel.send_replace(true);
            }
            json!({})
        }
        "migrate-incoming" => {
            if machine.state != RunState::InMigrate {
                return refuse("'-incoming' was not specified on the command line");
            }
            if machine.incoming {
                return refuse("The incoming migration has already been started");
            }
            let from = connection(machine, arguments)?;
            if let Err(error) = migration::listen(core, machine, from) {
                return refuse(&format!("Failed to bind socket: {error}"));
            }
            json!({})
        }
        _ => return Err(("CommandNotFound", format!("The command {command} has not been found"))),
    })
}

fn connection(machine: &mut Machine, arguments: &Value) -> Result<Connection, (&'static str, String)> {
    let uri = arguments["uri"].as_str().unwrap_or_default();
    let refuse = |desc: &str| ("GenericError", desc.to_owned());
    match uri.split_once(':') {
        Some(("unix", path)) => Ok(Connection::Path(path.to_owned())),
        Some(("fd", name)) => match machine.descriptors.remove(name) {
            Some(descriptor) => Ok(Connection::Given(descriptor)),
            None => Err(refuse(&format!("File descriptor named '{name}' has not been found"))),
        },
        _ => Err(refuse("invalid migration protocol")),
    }
}

fn query_migrate(machine: &Machine) -> Value {
    let mut answer = json!({});
    if let Some(status) = &machine.status {
        answer["status"] = json!(status.as_str());
    }
    if let Some(path) = &machine.listening {
        answer["socket-address"] = json!([{ "type": "unix", "path": path }]);
    }
    if let Some(error) = &machine.error {
        answer["error-desc"] = json!(error);
    }
    if let Some(downtime) = machine.downtime {
        answer["downtime"] = json!(downtime.as_millis() as u64);
    }
    if !machine.progress.is_null() {
        answer["ram"] = machine.progress.clone();
    }
    answer
}

fn ramblock(machine: &Machine) -> String {
    let empty;
    let guest = match &machine.guest {
        Some(guest) => guest,
        None => {
            empty = super::SimGuest::new(machine.spec.clone());
            &empty
        }
    };
    let head =
        format!("{:>24} {:>8}  {:>18} {:>18} {:>18}\r\n", "Block Name", "PSize", "Offset", "Used", "Total");
    let rows = guest.ram().iter().map(|block| {
        let len = block.bytes.len();
        format!("{:>24}    4 KiB  {:#018x} {len:#018x} {len:#018x}\r\n", block.name, 0)
    });
    std::iter::once(head).chain(rows).collect()
}
