//! A live, self-checking guest moves between two real QEMUs while its pages are written straight into the
//! destination's RAM. A machine that was not set up (`cargo xtask setup`) skips these by name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use dwcp_proto::Segment;
use dwcp_tests::{Backing, Qemu as Vm, QemuSpec, Role};
use dwcp_tests::{Kit, QemuVersion, ram};
use dwcp_vmm::mapped::{MappedSink, Pages, Ram, Unmapped};
use dwcp_vmm::qmp::{Parameters, Qemu, QmpConfig, RunState};
use dwcp_vmm::socket::{MigrationListener, connect};
use dwcp_vmm::stream::{Cutter, Piece, pieces};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

const LIMIT: Duration = Duration::from_secs(120);
/// Rounds after which the original stream follows, where it does.
const SWITCH: u32 = 3;

async fn qmp(vm: &Vm) -> Qemu {
    Qemu::connect(&vm.qmp_path(), QmpConfig::default()).await.unwrap()
}

async fn is_in(qemu: &Qemu, state: RunState) {
    let there = async {
        while qemu.run_state().await.unwrap() != state {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, there).await.unwrap_or_else(|_| panic!("never {state}"));
}

/// What came of a segment's bytes: how many were pages that did not go through the socket.
fn deliver(sink: &mut MappedSink, segment: &Segment) -> Vec<u8> {
    for piece in pieces(segment) {
        let at = |block, first, named| {
            let block = segment.names.name(block).unwrap();
            Pages { block, first, count: 1, named }
        };
        match piece.unwrap() {
            Piece::Opaque(bytes) => sink.opaque(bytes),
            Piece::Page { block, index, named, bytes } => {
                sink.pages(at(block, index, named), bytes.as_chunks().0).unwrap();
            }
            Piece::Zero { block, index, named } => sink.zeros(at(block, index, named), false).unwrap(),
        }
    }
    sink.take()
}

async fn a_guest_moves(kit: &Kit, version: QemuVersion, backing: Backing, dir: &Path, switch: bool) {
    let spec = QemuSpec { ram_mib: 160, ..QemuSpec::new(version, Role::Source) };
    let a = Vm::launch(kit, dir, "a", &spec).unwrap().booted().unwrap();
    let b = Vm::launch(kit, dir, "b", &QemuSpec { backing, ..spec.destination() }).unwrap();
    let (source, destination) = (qmp(&a).await, qmp(&b).await);
    assert!(matches!(Ram::open(&source).await, Err(Unmapped::NotShared)));
    let opened = Ram::open(&destination).await.unwrap();
    assert_eq!(opened.blocks().collect::<Vec<_>>(), [b"ram"]);
    assert_eq!(opened.bytes(), spec.ram_bytes());
    let mut sink = MappedSink::new(opened);

    // Some rounds at a pace that the guest outruns, then the end.
    let slow = Parameters {
        downtime_limit: Some(Duration::from_millis(1)),
        max_bandwidth: Some(64 << 20),
        avail_switchover_bandwidth: Some(1 << 20),
        ..Parameters::default()
    };
    let fast = Parameters {
        downtime_limit: Some(Duration::from_secs(2)),
        max_bandwidth: Some(1 << 30),
        avail_switchover_bandwidth: Some(1 << 30),
        ..Parameters::default()
    };
    source.set_capabilities(&[("events", true), ("return-path", false)]).await.unwrap();
    source.set_parameters(&slow).await.unwrap();
    destination.stop().await.unwrap();
    let incoming = dir.join("in");
    destination.incoming(&format!("unix:{}", incoming.display())).await.unwrap();
    let listener = MigrationListener::bind(&dir.join("run"), "out").unwrap();
    source.migrate(&listener.uri()).await.unwrap();
    let mut from = listener.accept().await.unwrap();
    let mut to = connect(&incoming).await.unwrap();
    let (mut came, mut went) = (0, 0);
    let enough = Notify::new();
    let relay = async {
        let mut cutter = Cutter::new(256 << 10);
        loop {
            let read = from.read(cutter.buffer()).await.unwrap();
            match read {
                0 => cutter.finish(),
                read => cutter.filled(read),
            }
            while let Some(segment) = cutter.pop() {
                let out = match switch && cutter.version().0 >= SWITCH {
                    true => segment.bytes.to_vec(),
                    false => deliver(&mut sink, &segment),
                };
                came += segment.bytes.len();
                went += out.len();
                to.write_all(&out).await.unwrap();
            }
            if read == 0 {
                return;
            }
            if cutter.version().0 > SWITCH {
                enough.notify_one();
            }
        }
    };
    // Beside the relay: QEMU answers nothing while it waits for room in the stream of its last round.
    let hurry = async {
        enough.notified().await;
        source.set_parameters(&fast).await.unwrap();
        std::future::pending().await
    };
    // A guest that is done before there was enough of it needs no hurry.
    let done = async {
        tokio::select! {
            () = relay => {}
            () = hurry => {}
        }
    };
    timeout(LIMIT, done).await.unwrap();
    is_in(&destination, RunState::Paused).await;
    is_in(&source, RunState::PostMigrate).await;
    assert_eq!(ram::compare(&a, &b, spec.ram_bytes()).unwrap(), None);
    assert!(went < came / 2, "{went} of {came} bytes went through the socket");
    assert!(switch || went < 2 << 20, "{went} of {came} bytes went through the socket");
    destination.cont().await.unwrap();
    b.guest_ok_for(Duration::from_secs(1)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_into_a_memfd_7_2_and_the_plain_stream_takes_over() {
    let name = "a_guest_moves_into_a_memfd_7_2_and_the_plain_stream_takes_over";
    let Some(kit) = Kit::or_skip(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    a_guest_moves(&kit, QemuVersion::V7_2, Backing::Memfd, dir.path(), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_into_a_file_10_0() {
    let Some(kit) = Kit::or_skip("a_guest_moves_into_a_file_10_0") else { return };
    let dir = tempfile::tempdir().unwrap();
    // Whatever the file held before must not show through.
    let file = dir.path().join("ram");
    std::fs::write(&file, vec![0xee; (160 << 20) + (8 << 10)]).unwrap();
    a_guest_moves(&kit, QemuVersion::V10_0, Backing::File(file), dir.path(), false).await;
}
