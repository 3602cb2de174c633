//! Real QEMUs, driven as the agents do. A machine that was not set up (`cargo xtask setup`) skips them by name.
//!
//! The guest has no operating system: a firmware of 31 bytes writes to 112 pages for ever. That is enough for several
//! rounds, starts in no time, and leaves nobody else's code in the recorded streams. `DWCP_RECORD=1` records them anew.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dwcp_proto::Segment;
use dwcp_proto::limits::PAGE_SIZE;
use dwcp_tests::{Kit, QemuVersion};
use dwcp_vmm::describe::VmDescription;
use dwcp_vmm::preflight::{self, Finding};
use dwcp_vmm::qmp::{
    Event, EventKind, Events, MigrationStatus, Parameters, Qemu, QmpConfig, QmpError, RunState,
};
use dwcp_vmm::socket::{MigrationListener, OpenError, open_channels, open_incoming, open_outgoing};
use dwcp_vmm::stream::{Cutter, OpaqueReason, Piece, content, pieces, serialise};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

const LIMIT: Duration = Duration::from_secs(60);

/// Real-mode code at F000:0000 that adds one to the first word of each page from 64 KiB to 512 KiB, for ever; the
/// reset vector jumps to it. Before each round it changes CR0.WP, which does nothing here but empty the TLB: QEMU
/// before 9.0 under TCG goes on to write through TLB entries whose pages it has just marked clean, and so loses
/// writes when it migrates (seen here with 7.2, from one QEMU straight to the other).
fn firmware() -> Vec<u8> {
    const PROGRAM: [u8; 31] = [
        0x0f, 0x20, 0xc0, //                   again: mov eax, cr0
        0x66, 0x35, 0x00, 0x00, 0x01, 0x00, //        xor eax, 0x10000
        0x0f, 0x22, 0xc0, //                          mov cr0, eax
        0xb8, 0x00, 0x10, //                          mov ax, 0x1000
        0x8e, 0xd8, //                         next:  mov ds, ax
        0xff, 0x06, 0x00, 0x00, //                    inc word [0]
        0x05, 0x00, 0x01, //                          add ax, 0x100
        0x3d, 0x00, 0x80, //                          cmp ax, 0x8000
        0x75, 0xf2, //                                jne next
        0xeb, 0xe1, //                                jmp again
    ];
    const JUMP: [u8; 5] = [0xea, 0x00, 0x00, 0x00, 0xf0];
    let mut image = vec![0xff; 64 << 10];
    image[..PROGRAM.len()].copy_from_slice(&PROGRAM);
    image[0xfff0..0xfff5].copy_from_slice(&JUMP);
    image
}

/// A QEMU process that is killed with this value.
struct Vm {
    process: Child,
    qmp: PathBuf,
    qemu: Qemu,
}

impl Vm {
    async fn start(kit: &Kit, version: QemuVersion, dir: &Path, name: &str, arguments: &[&str]) -> Self {
        Self::run(kit.qemu(version), dir, name, arguments).await
    }

    /// Runs as a user who may not write where root may, only look and read; so it works wherever the laboratory lies.
    async fn start_as_nobody(
        kit: &Kit,
        version: QemuVersion,
        dir: &Path,
        name: &str,
        arguments: &[&str],
    ) -> Self {
        let inner = kit.qemu(version);
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        command.args(["--inh-caps", "-all,+dac_read_search", "--ambient-caps", "+dac_read_search"]);
        command.arg(inner.get_program()).args(inner.get_args());
        command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Self::run(command, dir, name, arguments).await
    }

    async fn run(mut command: Command, dir: &Path, name: &str, arguments: &[&str]) -> Self {
        let image = dir.join("firmware");
        std::fs::write(&image, firmware()).unwrap();
        let qmp = dir.join(format!("{name}.qmp"));
        command.args([
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-accel",
            "tcg",
            "-M",
            "pc",
            "-m",
            "16",
        ]);
        command.arg("-bios").arg(&image);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display())).args(arguments);
        let process = command.stdin(Stdio::null()).spawn().unwrap();
        let connected = async {
            loop {
                match Qemu::connect(&qmp, QmpConfig::default()).await {
                    Ok(qemu) => return qemu,
                    Err(QmpError::Connect { .. }) => sleep(Duration::from_millis(5)).await,
                    Err(error) => panic!("{error}"),
                }
            }
        };
        let qemu = timeout(LIMIT, connected).await.unwrap();
        Vm { process, qmp, qemu }
    }

    async fn is_in(&self, state: RunState) {
        let there = async {
            while self.qemu.run_state().await.unwrap() != state {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(LIMIT, there).await.unwrap_or_else(|_| panic!("never {state}"));
    }

    /// The first 640 KiB and everything from 1 MiB on: what is RAM in the guest's eyes.
    async fn memory(&self, dir: &Path) -> Vec<u8> {
        let file = dir.join("memory");
        let arguments = json!({ "val": 0, "size": 16 << 20, "filename": file });
        self.qemu.qmp().execute("pmemsave", arguments).await.unwrap();
        ram(std::fs::read(file).unwrap())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn ram(mut memory: Vec<u8>) -> Vec<u8> {
    memory.drain(640 << 10..1 << 20);
    memory
}

async fn event(events: &mut Events, kind: EventKind) -> Event {
    let awaited = async {
        loop {
            let event = events.recv().await.unwrap();
            if event.kind() == kind {
                return event;
            }
        }
    };
    timeout(LIMIT, awaited).await.unwrap_or_else(|_| panic!("no event {kind:?}"))
}

/// A VMM that may not use any path of the agent's still migrates, since its socket is handed to it.
#[tokio::test]
async fn qemus_of_another_user_migrate_through_sockets_that_they_are_given() {
    let name = "qemus_of_another_user_migrate_through_sockets_that_they_are_given";
    let Some(kit) = Kit::or_skip(name) else { return };
    if !rustix::process::geteuid().is_root() {
        return dwcp_tests::skip(name, "only root may start a process of another user");
    }
    for version in QemuVersion::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        std::fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(65534), Some(65534)).unwrap();
        let a = Vm::start_as_nobody(&kit, version, &theirs, "a", &[]).await;
        let b = Vm::start_as_nobody(&kit, version, &theirs, "b", &["-incoming", "defer"]).await;
        let mut events = a.qemu.events();
        a.qemu.set_capabilities(&[("events", true)]).await.unwrap();

        // By a path it does not work.
        let listener = MigrationListener::bind(&ours, "out").unwrap();
        let refused = a.qemu.migrate(&listener.uri()).await;
        if refused.is_ok() {
            event(&mut events, EventKind::Migration(MigrationStatus::Failed)).await;
        }
        let mut to = open_incoming(&b.qemu).await.unwrap();
        let mut from = open_outgoing(&a.qemu).await.unwrap();
        timeout(LIMIT, tokio::io::copy(&mut from, &mut to)).await.unwrap().unwrap();
        b.is_in(RunState::Running).await;
        a.is_in(RunState::PostMigrate).await;
    }
}

/// Multifd needs a path. One that only its name guards will do for any user; that one cannot be used is told, with QEMU's own words.
#[tokio::test]
async fn qemus_of_another_user_bring_channels_to_a_secret_path() {
    let name = "qemus_of_another_user_bring_channels_to_a_secret_path";
    let Some(kit) = Kit::or_skip(name) else { return };
    if !rustix::process::geteuid().is_root() {
        return dwcp_tests::skip(name, "only root may start a process of another user");
    }
    for version in QemuVersion::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        std::fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(65534), Some(65534)).unwrap();
        let a = Vm::start_as_nobody(&kit, version, &theirs, "a", &[]).await;
        assert_eq!(a.qemu.set_capabilities(&[("multifd", true)]).await.unwrap(), [""; 0]);
        let three = Parameters { multifd_channels: Some(3), ..Parameters::default() };
        assert_eq!(a.qemu.set_parameters(&three).await.unwrap(), [""; 0]);

        let listener = MigrationListener::bind(&ours, "private").unwrap();
        let error = open_channels(&a.qemu, &listener, 3).await.unwrap_err();
        assert!(
            matches!(&error, OpenError::Connections { have: 0, wanted: 4, reason: Some(_), .. })
                || matches!(&error, OpenError::Qmp(refused) if refused.is_refusal()),
            "{error}"
        );
        assert!(error.to_string().contains("Permission denied"), "{error}");
        drop(listener);
        let listener = MigrationListener::bind_secret(&ours, "secret").unwrap();
        let channels = open_channels(&a.qemu, &listener, 3).await.unwrap();
        assert_eq!(channels.multifd.len(), 3);
        let path = listener.path().to_owned();
        drop((listener, channels));
        assert!(!path.exists());
        a.is_in(RunState::Running).await;
    }
}

/// The whole test against one version.
async fn a_guest_moves(kit: Kit, version: QemuVersion) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let a = Vm::start(&kit, version, dir, "a", &["-name", "guest"]).await;
    let b = Vm::start(&kit, version, dir, "b", &["-name", "guest", "-incoming", "defer"]).await;
    let mut events = a.qemu.events();

    // Preflight.
    assert_eq!(preflight::source(&a.qemu, false).await.unwrap(), []);
    assert_eq!(preflight::destination(&b.qemu).await.unwrap(), []);
    assert!(matches!(preflight::destination(&a.qemu).await.unwrap()[..], [Finding::DestinationState { .. }]));
    let described = a.qemu.describe().await.unwrap();
    let peer = VmDescription::from_json(&b.qemu.describe().await.unwrap().to_json().unwrap()).unwrap();
    assert_eq!(preflight::compare(&described, &peer), []);
    assert_eq!(described.machine, format!("pc-i440fx-{}", version.name()));
    assert_eq!((described.cpu.as_str(), described.cpus), ("qemu64-x86_64-cpu", 1));
    assert_eq!(described.name.as_deref(), Some("guest"));
    assert_eq!((described.ram[0].name.as_str(), described.ram[0].used), ("pc.ram", 16 << 20));
    assert_eq!(a.qemu.memory_backends().await.unwrap()[0].size, 16 << 20);

    // Several rounds: the limit stays out of reach until the fourth begins. The first one must take longer than the 100 ms
    // after which QEMU first measures, or it is the last one, too.
    let unknown =
        a.qemu.set_capabilities(&[("events", true), ("return-path", false), ("nonsense", false)]).await;
    assert_eq!(unknown.unwrap(), ["nonsense"]);
    let slow = Parameters {
        downtime_limit: Some(Duration::from_millis(20)),
        max_bandwidth: Some(2 << 20),
        avail_switchover_bandwidth: Some(1 << 20),
        ..Parameters::default()
    };
    let unknown = a.qemu.set_parameters(&slow).await.unwrap();
    assert_eq!(unknown.is_empty(), version == QemuVersion::V10_0, "{unknown:?}");

    b.qemu.stop().await.unwrap();
    assert_eq!(b.qemu.run_state().await.unwrap(), RunState::InMigrate);
    let mut to = open_incoming(&b.qemu).await.unwrap();
    assert!(matches!(open_incoming(&b.qemu).await, Err(OpenError::Qmp(refused)) if refused.is_refusal()));
    // What was refused left nothing behind.
    assert!(b.qemu.close("dwcp-migration").await.unwrap_err().is_refusal());
    let mut from = open_outgoing(&a.qemu).await.unwrap();
    let mut segments: Vec<Segment> = Vec::new();
    let relay = async {
        let mut cutter = Cutter::new(256 << 10);
        loop {
            match from.read(cutter.buffer()).await.unwrap() {
                0 => break,
                read => cutter.filled(read),
            }
            cutter.flush();
            while let Some(segment) = cutter.pop() {
                to.write_all(&segment.bytes).await.unwrap();
                segments.push(segment);
            }
        }
        cutter.finish();
        while let Some(segment) = cutter.pop() {
            to.write_all(&segment.bytes).await.unwrap();
            segments.push(segment);
        }
        cutter
    };
    let converge = async {
        loop {
            let event = events.recv().await.unwrap();
            match event.kind() {
                EventKind::Stop => return event,
                EventKind::MigrationPass(4) => {
                    let fast = Parameters {
                        downtime_limit: Some(Duration::from_secs(2)),
                        avail_switchover_bandwidth: Some(1 << 30),
                        max_bandwidth: Some(1 << 30),
                        ..Parameters::default()
                    };
                    a.qemu.set_parameters(&fast).await.unwrap();
                }
                _ => {}
            }
        }
    };
    let (cutter, stopped) = timeout(LIMIT, async { tokio::join!(relay, converge) }).await.unwrap();
    assert!(stopped.at.is_some());

    // The handover: complete and paused there, postmigrate here, equal, and back from either.
    b.is_in(RunState::Paused).await;
    assert_eq!(b.qemu.migration().await.unwrap().status, Some(MigrationStatus::Completed));
    a.is_in(RunState::PostMigrate).await;
    let info = a.qemu.migration().await.unwrap();
    assert!(info.ram.unwrap().dirty_sync_count >= 4 && info.downtime.is_some(), "{info:?}");
    assert!(matches!(preflight::source(&a.qemu, false).await.unwrap()[..], [Finding::SourceState { .. }]));
    let memory = a.memory(dir).await;
    assert!(memory == b.memory(dir).await, "RAM is equal");
    check_stream(&cutter, &segments, &memory, info.ram.unwrap().dirty_sync_count);
    let mut resumed = b.qemu.events();
    b.qemu.cont().await.unwrap();
    b.qemu.announce_self().await.unwrap();
    event(&mut resumed, EventKind::Resume).await;
    a.qemu.cont().await.unwrap();
    a.is_in(RunState::Running).await;

    // One client a socket: a second one connects and hears nothing.
    let short = QmpConfig { connect: Duration::from_millis(100), ..QmpConfig::default() };
    let second = Qemu::connect(&a.qmp, short).await.unwrap_err();
    assert!(matches!(second, QmpError::NoGreeting { .. }), "{second}");
    a.qemu.quit().await.unwrap();
    event(&mut events, EventKind::Shutdown).await;

    if std::env::var_os("DWCP_RECORD").is_some() {
        record(version, &segments);
    }
}

/// The parser understood all of RAM, and the pages that it found are the guest's.
fn check_stream(cutter: &Cutter, segments: &[Segment], memory: &[u8], rounds: u64) {
    assert_eq!(cutter.opaque_reason(), Some(OpaqueReason::DeviceState));
    assert!((2..rounds).contains(&u64::from(cutter.version().0)), "{}", cutter.version());
    let mut rebuilt = vec![0xaa; 16 << 20];
    let mut offset = 0;
    for segment in segments {
        assert_eq!(segment.offset.0, offset);
        offset = segment.end().0;
        let bytes = serialise(&segment.records, &segment.names, &content(segment).unwrap()).unwrap();
        assert!(bytes == segment.bytes);
        for piece in pieces(segment) {
            let (block, index, bytes) = match piece.unwrap() {
                Piece::Opaque(_) => continue,
                Piece::Page { block, index, bytes, .. } => (block, index, bytes),
                Piece::Zero { block, index, .. } => (block, index, &[0; PAGE_SIZE][..]),
            };
            if segment.names.name(block) == Some(b"pc.ram") {
                rebuilt[index.0 as usize * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(bytes);
            }
        }
    }
    assert!(ram(rebuilt) == memory, "the pages of the stream are the guest's RAM");
}

fn record(version: QemuVersion, segments: &[Segment]) {
    let stream: Vec<u8> = segments.iter().flat_map(|segment| segment.bytes.iter().copied()).collect();
    let mut packed = vec![0; zstd_safe::compress_bound(stream.len())];
    let len = zstd_safe::compress(&mut packed[..], &stream, 19).unwrap();
    packed.truncate(len);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded");
    std::fs::write(folder.join(format!("qemu-{}.stream.zst", version.name())), packed).unwrap();
}

#[tokio::test]
async fn a_guest_moves_between_two_qemus_7_2() {
    let Some(kit) = Kit::or_skip("a_guest_moves_between_two_qemus_7_2") else { return };
    a_guest_moves(kit, QemuVersion::V7_2).await;
}

#[tokio::test]
async fn a_guest_moves_between_two_qemus_10_0() {
    let Some(kit) = Kit::or_skip("a_guest_moves_between_two_qemus_10_0") else { return };
    a_guest_moves(kit, QemuVersion::V10_0).await;
}

/// What else QEMU can be asked to put into its stream, as seen by the parser.
async fn stream_with(kit: &Kit, version: QemuVersion, arguments: &[&str], capability: &str) -> Cutter {
    let dir = tempfile::tempdir().unwrap();
    let arguments: Vec<_> =
        arguments.iter().map(|text| text.replace("DIR", &dir.path().display().to_string())).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let vm = Vm::start(kit, version, dir.path(), "a", &arguments).await;
    assert_eq!(vm.qemu.set_capabilities(&[(capability, true)]).await.unwrap(), [""; 0]);
    vm.qemu.stop().await.unwrap();
    let listener = MigrationListener::bind(&dir.path().join("run"), "out").unwrap();
    vm.qemu.migrate(&listener.uri()).await.unwrap();
    let mut from = listener.accept().await.unwrap();
    let mut cutter = Cutter::new(256 << 10);
    // Some wait for a destination's answer at the end and would never close.
    let read = async {
        while cutter.opaque_reason().is_none() {
            match from.read(cutter.buffer()).await.unwrap() {
                0 => return cutter.finish(),
                read => cutter.filled(read),
            }
            while cutter.pop().is_some() {}
        }
    };
    timeout(LIMIT, read).await.unwrap();
    cutter
}

#[tokio::test]
async fn block_lists_of_other_capabilities_are_understood() {
    let Some(kit) = Kit::or_skip("block_lists_of_other_capabilities_are_understood") else { return };
    let shared = "memory-backend-file,id=ram,size=16M,mem-path=DIR/ram,share=on";
    let shared = ["-object", shared, "-machine", "pc,memory-backend=ram"];
    for version in QemuVersion::ALL {
        for (arguments, capability) in
            [(&[][..], "postcopy-ram"), (&shared, "x-ignore-shared"), (&[], "validate-uuid")]
        {
            let cutter = stream_with(&kit, version, arguments, capability).await;
            assert_eq!(cutter.opaque_reason(), Some(OpaqueReason::DeviceState), "{version:?} {capability}");
            assert_eq!(cutter.layout().blocks()[0].used, 16 << 20);
        }
        // QEMU compresses by itself: not for us to look into.
        let cutter = stream_with(&kit, version, &[], "xbzrle").await;
        assert_eq!(
            cutter.opaque_reason(),
            Some(OpaqueReason::DeviceState),
            "{version:?}: one round, so no XBZRLE"
        );
    }
}

#[tokio::test]
async fn what_stands_in_the_way_is_found() {
    let Some(kit) = Kit::or_skip("what_stands_in_the_way_is_found") else { return };
    for version in QemuVersion::ALL {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.img");
        std::fs::write(&disk, [0; 65536]).unwrap();
        let drive = format!("file={},format=raw,if=none,id=d0", disk.display());
        let shown = dir.path().display().to_string();
        let arguments = ["-drive", &drive, "-device", "virtio-blk-pci,drive=d0", "-smp", "2"];
        let a = Vm::start(&kit, version, dir.path(), "a", &arguments).await;
        let found = preflight::source(&a.qemu, false).await.unwrap();
        assert!(
            matches!(&found[..], [Finding::LocalDisk { file, .. }] if *file == disk.display().to_string())
        );
        assert_eq!(preflight::source(&a.qemu, true).await.unwrap(), []);
        // A device that cannot be migrated.
        std::fs::create_dir(dir.path().join("fat")).unwrap();
        let fat = format!("file=fat:rw:{shown}/fat,format=raw,if=none,id=f0");
        let fat = ["-drive", &fat, "-device", "virtio-blk-pci,drive=f0"];
        let blocked = Vm::start(&kit, version, dir.path(), "c", &fat).await;
        let found = preflight::source(&blocked.qemu, true).await.unwrap();
        assert!(
            found.iter().any(|f| matches!(f, Finding::Blocked { reason } if reason.contains("vvfat"))),
            "{found:?}"
        );

        let b = Vm::start(&kit, version, dir.path(), "b", &["-cpu", "max", "-M", "q35", "-m", "32"]).await;
        let (of_a, of_b) = (a.qemu.describe().await.unwrap(), b.qemu.describe().await.unwrap());
        let text: Vec<_> = preflight::compare(&of_a, &of_b).iter().map(ToString::to_string).collect();
        for want in [
            "machine type: pc-i440fx",
            "CPU model: qemu64",
            "number of CPUs: 2",
            "RAM block pc.ram: 16777216",
        ] {
            assert!(text.iter().any(|text| text.starts_with(want)), "{want}: {text:#?}");
        }
        // Waiting at an address of its own is not -incoming defer.
        let address = format!("unix:{shown}/own");
        let own = Vm::start(&kit, version, dir.path(), "d", &["-incoming", &address]).await;
        assert_eq!(preflight::destination(&own.qemu).await.unwrap(), [Finding::DestinationListens]);
        assert_eq!(
            own.qemu.qmp().execute("no-such", Value::Null).await.unwrap_err().to_string(),
            "no-such: The command no-such has not been found"
        );
    }
}
