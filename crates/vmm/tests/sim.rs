//! The simulated VMM, driven as a real one is: QMP, a relay between the two migration sockets, faults.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use dwcp_vmm::qmp::{EventKind, MigrationStatus, Qemu, QmpConfig, QmpError, RunState};
use dwcp_vmm::sim::{Fault, GuestSpec, SimVmm};
use dwcp_vmm::socket::{MigrationListener, connect, open_incoming, open_outgoing};
use dwcp_vmm::stream::{Cutter, OpaqueReason, content, serialise};
use dwcp_vmm::{describe::VmDescription, preflight};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Nothing in these tests takes long; what hangs fails.
const LIMIT: Duration = Duration::from_secs(60);

fn spec() -> GuestSpec {
    GuestSpec { pages: 2048, hot_pages: 128, ..GuestSpec::default() }
}

struct Pair {
    dir: tempfile::TempDir,
    source: SimVmm,
    destination: SimVmm,
    from: Qemu,
    to: Qemu,
}

impl Pair {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a.qmp"), dir.path().join("b.qmp"));
        let source = SimVmm::running(&a, spec()).unwrap();
        let destination = SimVmm::incoming(&b, spec()).unwrap();
        let from = Qemu::connect(&a, QmpConfig::default()).await.unwrap();
        let to = Qemu::connect(&b, QmpConfig::default()).await.unwrap();
        from.set_capabilities(&[("events", true), ("from-the-future", true)]).await.unwrap();
        Pair { dir, source, destination, from, to }
    }

    /// Migrates through a relay that takes the stream apart and puts it together. True once the relay passed all.
    async fn migrate(&self) -> bool {
        self.to.stop().await.unwrap();
        let to = open_incoming(&self.to).await.unwrap();
        relay(open_outgoing(&self.from).await.unwrap(), to).await
    }

    /// The same, over sockets that have paths.
    async fn migrate_over_paths(&self) -> bool {
        let listener = MigrationListener::bind(&self.dir.path().join("run"), "out").unwrap();
        let incoming = self.dir.path().join("in");
        self.to.stop().await.unwrap();
        self.to.incoming(&format!("unix:{}", incoming.display())).await.unwrap();
        self.from.migrate(&listener.uri()).await.unwrap();
        let from = listener.accept().await.unwrap();
        let to = connect(&incoming).await.unwrap();
        relay(from, to).await
    }

    async fn ends_as(&self, status: MigrationStatus) {
        // A status has no event of its own without capability; polling is what an agent does, too.
        while self.from.migration().await.unwrap().status != Some(status.clone()) {
            tokio::task::yield_now().await;
        }
    }
}

async fn relay(mut from: UnixStream, mut to: UnixStream) -> bool {
    let mut cutter = Cutter::new(128 << 10);
    let mut ended = false;
    while !ended {
        match from.read(cutter.buffer()).await {
            Ok(0) => {
                ended = true;
                cutter.finish();
            }
            Ok(read) => {
                cutter.filled(read);
                cutter.flush();
            }
            Err(_) => return false,
        }
        while let Some(segment) = cutter.pop() {
            let content = content(&segment).unwrap();
            let bytes = serialise(&segment.records, &segment.names, &content).unwrap();
            if to.write_all(&bytes).await.is_err() {
                return false;
            }
        }
    }
    assert_ne!(cutter.opaque_reason(), Some(OpaqueReason::NotQemu));
    true
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("hangs")
}

#[tokio::test]
async fn a_guest_moves_and_never_runs_twice() {
    within(async {
        let pair = Pair::new().await;
        let (mut at_source, mut at_destination) = (pair.from.events(), pair.to.events());
        assert_eq!(preflight::source(&pair.from, false).await.unwrap(), []);
        assert_eq!(preflight::destination(&pair.to).await.unwrap(), []);
        let a = pair.from.describe().await.unwrap();
        let b = VmDescription::from_json(&pair.to.describe().await.unwrap().to_json().unwrap()).unwrap();
        assert_eq!(preflight::compare(&a, &b), []);
        assert_eq!(preflight::destination(&pair.from).await.unwrap().len(), 1);

        assert!(pair.migrate().await);
        assert!(pair.source.reaches(RunState::PostMigrate).await);
        assert!(pair.destination.reaches(RunState::Paused).await);
        assert!(!pair.source.is_running() && !pair.destination.is_running());
        assert_eq!(pair.source.ram(), pair.destination.ram());
        let info = pair.to.migration().await.unwrap();
        assert_eq!(info.status, Some(MigrationStatus::Completed));

        pair.to.cont().await.unwrap();
        pair.to.announce_self().await.unwrap();
        assert_eq!(pair.to.run_state().await.unwrap(), RunState::Running);
        assert_eq!(at_destination.recv().await.unwrap().kind(), EventKind::Resume);
        let mut seen = Vec::new();
        while seen.last() != Some(&EventKind::Migration(MigrationStatus::Completed)) {
            seen.push(at_source.recv().await.unwrap().kind());
        }
        assert_eq!(
            seen[..3],
            [
                EventKind::Migration(MigrationStatus::Setup),
                EventKind::Migration(MigrationStatus::Active),
                EventKind::MigrationPass(1)
            ]
        );
        assert!(seen.contains(&EventKind::MigrationPass(3)), "{seen:?}");
        assert_eq!(seen.iter().filter(|kind| **kind == EventKind::Stop).count(), 1);

        pair.from.quit().await.unwrap();
        pair.source.died().await;
        let mut last = None;
        while let Ok(event) = at_source.recv().await {
            last = Some(event.kind());
        }
        assert_eq!(last, Some(EventKind::Shutdown));
    })
    .await;
}

#[tokio::test]
async fn the_source_can_come_back_from_postmigrate() {
    within(async {
        let pair = Pair::new().await;
        assert!(pair.migrate_over_paths().await);
        assert!(pair.source.reaches(RunState::PostMigrate).await);
        assert!(preflight::source(&pair.from, false).await.unwrap()[0].is_fatal());
        pair.from.cont().await.unwrap();
        assert!(pair.source.is_running());
    })
    .await;
}

#[tokio::test]
async fn a_failure_in_any_place_leaves_the_guest_running_at_the_source() {
    for at in [0, 100, 1 << 20, 4_260_000] {
        within(async {
            let pair = Pair::new().await;
            pair.source.inject(Fault::FailAt(at));
            pair.migrate().await;
            pair.ends_as(MigrationStatus::Failed).await;
            assert!(pair.source.reaches(RunState::Running).await);
            assert!(pair.from.migration().await.unwrap().error.unwrap().contains("simulation"));
            pair.destination.died().await;
        })
        .await;
    }
}

#[tokio::test]
async fn a_cancelled_migration_leaves_the_guest_running_at_the_source() {
    within(async {
        let pair = Pair::new().await;
        pair.source.inject(Fault::StallAt(1 << 20));
        let cancel = async {
            while pair.from.migration().await.unwrap().ram.is_none_or(|ram| ram.transferred < 900 << 10) {
                tokio::task::yield_now().await;
            }
            assert!(matches!(
                preflight::source(&pair.from, false).await.unwrap()[..],
                [preflight::Finding::SourceBusy { .. }]
            ));
            pair.from.cancel().await.unwrap();
        };
        tokio::join!(pair.migrate(), cancel);
        pair.ends_as(MigrationStatus::Cancelled).await;
        assert!(pair.source.is_running());
    })
    .await;
}

#[tokio::test]
async fn a_vmm_can_die_hang_refuse_and_talk_nonsense() {
    within(async {
        let pair = Pair::new().await;
        pair.destination.inject(Fault::DieAt(2 << 20));
        assert!(!pair.migrate().await);
        pair.destination.died().await;
        assert!(matches!(pair.to.run_state().await, Err(QmpError::Closed { .. })));
        pair.ends_as(MigrationStatus::Failed).await;
        assert!(pair.source.is_running());

        pair.source.inject(Fault::Refuse("cont".into()));
        assert!(pair.from.cont().await.unwrap_err().is_refusal());
        pair.source.inject(Fault::Say("query-status".into(), "{\"event\": \"NEWS\"}".into()));
        assert_eq!(pair.from.run_state().await.unwrap(), RunState::Running);
        pair.source.inject(Fault::Hang("stop".into()));
        let stop =
            pair.from.qmp().execute_within("stop", serde_json::Value::Null, Duration::from_millis(5)).await;
        assert!(matches!(stop, Err(QmpError::Timeout { .. })));
    })
    .await;
}

#[tokio::test]
async fn qemus_refusals_are_the_simulations() {
    within(async {
        let pair = Pair::new().await;
        let here = |path: &Path| format!("unix:{}", path.join("x").display());
        assert!(pair.from.incoming(&here(pair.dir.path())).await.unwrap_err().is_refusal());
        assert!(pair.to.migrate(&here(pair.dir.path())).await.unwrap_err().is_refusal());
        assert!(pair.from.migrate("tcp:127.0.0.1:1").await.unwrap_err().is_refusal());
        assert!(pair.from.migrate("fd:never-given").await.unwrap_err().is_refusal());
        assert!(pair.from.close("never-given").await.unwrap_err().is_refusal());
        pair.to.incoming(&here(pair.dir.path())).await.unwrap();
        assert!(pair.to.incoming(&here(pair.dir.path())).await.unwrap_err().is_refusal());
        assert_eq!(preflight::destination(&pair.to).await.unwrap(), [preflight::Finding::DestinationListens]);
        assert!(pair.from.qmp().execute("no-such", serde_json::Value::Null).await.unwrap_err().is_refusal());
    })
    .await;
}
