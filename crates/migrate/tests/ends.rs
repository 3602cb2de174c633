//! A migration that is cancelled, or whose deadline passes, in one phase after the other: the guest stays where it was, nothing is
//! left behind, and the next migration succeeds. After the commit neither has an effect.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod scene;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dwcp_migrate::Policy;
use dwcp_migrate::spec::{MigrateSpec, ModeWish, PathWish};
use dwcp_migrate::status::Phase;
use dwcp_proto::MigrationId;
use dwcp_vmm::sim::{Fault, SimVmm};

use scene::{LIMIT, Node, Scene, ended, guest};

/// How a migration is ended before its time.
#[derive(Debug, Clone, Copy, PartialEq)]
enum By {
    Cancel,
    /// Cancelled at the destination's agent.
    CancelThere,
    Deadline,
}

/// What a migration takes of this process and of its nodes' folders.
#[derive(Debug)]
struct Taken {
    descriptors: usize,
    tasks: usize,
    files: Vec<PathBuf>,
}

impl Taken {
    fn by(scene: &Scene) -> Self {
        let state = |node: &Node| files(&node.dir.path().join("state"));
        Taken {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
            files: [state(&scene.a), state(&scene.b)].concat(),
        }
    }
}

/// The files below a folder, but for archived journals.
fn files(folder: &Path) -> Vec<PathBuf> {
    let below = |path: PathBuf| match path.is_dir() {
        true if path.ends_with("archive") => Vec::new(),
        true => files(&path),
        false => vec![path],
    };
    std::fs::read_dir(folder).unwrap().flat_map(|entry| below(entry.unwrap().path())).collect()
}

impl Scene {
    /// Waits until no more is taken than was before.
    async fn leaves_no_more_than(&self, before: &Taken) {
        let started = Instant::now();
        loop {
            let now = Taken::by(self);
            let no_more = now.descriptors <= before.descriptors && now.tasks <= before.tasks;
            if no_more && now.files == before.files {
                return;
            }
            assert!(started.elapsed() < LIMIT, "left behind: {now:?}, before: {before:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A new VMM waits in the place of the destination's.
    fn replace_destination(&mut self) {
        self.destination.kill();
        std::fs::remove_file(self.b.qmp()).unwrap();
        self.destination = SimVmm::incoming(&self.b.qmp(), guest()).unwrap();
    }

    /// Waits until it is in this phase; on a busy machine its deadline may come first.
    async fn shows(&self, id: &MigrationId, phase: Phase) {
        let mut watch = self.a.engine.watch(id).unwrap();
        let there = watch.wait_for(|s| s.phase == phase || s.phase.is_end());
        tokio::time::timeout(LIMIT, there).await.unwrap().unwrap();
    }
}

/// Ends a migration that is held in `phase` by what `hold` does, and then has another one.
async fn ends_in(phase: Phase, path: PathWish, by: By, hold: impl Fn(&Scene, &mut MigrateSpec)) {
    let mut scene = Scene::new(true, true, Policy::default()).await;
    let before = Taken::by(&scene);
    scene.awaited().await;
    let id = MigrationId::new("held").unwrap();
    let mut spec = MigrateSpec { id: Some(id.clone()), mode: ModeWish::Internet, path, ..scene.spec() };
    if by == By::Deadline {
        spec.deadline = Some(Duration::from_millis(1500));
    }
    hold(&scene, &mut spec);
    scene.a.engine.migrate(spec).await.unwrap();
    scene.shows(&id, phase).await;
    let code = match by {
        By::Cancel => {
            scene.a.engine.cancel(&id).await.unwrap();
            "cancelled"
        }
        By::CancelThere => {
            scene.b.engine.cancel(&id).await.unwrap();
            "cancelled"
        }
        By::Deadline => "deadline",
    };
    let status = ended(&scene.a.engine, &id).await;
    assert_eq!(
        (status.phase, status.error.unwrap().code.as_str()),
        (Phase::Aborted, code),
        "{phase:?} {by:?}"
    );
    scene.assert_stayed();
    scene.source.heal();
    if phase != Phase::Preparing {
        // Else what it still says to the VMM could go to the next one.
        ended(&scene.b.engine, &id).await;
    }
    scene.replace_destination();
    if let Some(waiting) = scene.b.engine.list().into_iter().find(|status| !status.phase.is_end()) {
        // The destination waits on, for a VMM that is gone.
        scene.b.engine.cancel(&waiting.id).await.unwrap();
    }
    scene.leaves_no_more_than(&before).await;

    scene.awaited().await;
    let status = scene.migrate(MigrateSpec { path, ..scene.spec() }).await.unwrap();
    assert_eq!((status.phase, status.error), (Phase::Completed, None), "{phase:?} {by:?}");
    scene.assert_moved();
}

#[tokio::test(flavor = "multi_thread")]
async fn ended_while_the_destination_does_not_answer() {
    for by in [By::Cancel, By::Deadline] {
        ends_in(Phase::Preparing, PathWish::V3, by, |scene, _| {
            scene.destination.inject(Fault::Hang("query-name".into()));
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ended_in_precopy() {
    for path in [PathWish::V1, PathWish::V3] {
        for by in [By::Cancel, By::CancelThere, By::Deadline] {
            ends_in(Phase::Precopy, path, by, |_, spec| spec.bandwidth_limit = Some(100_000)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ended_while_the_stream_stands_still() {
    for by in [By::Cancel, By::CancelThere, By::Deadline] {
        ends_in(Phase::Precopy, PathWish::V3, by, |scene, _| {
            scene.destination.inject(Fault::StallAt(1 << 20));
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ended_in_the_switchover() {
    for by in [By::Cancel, By::CancelThere, By::Deadline] {
        ends_in(Phase::Switchover, PathWish::V3, by, |scene, _| {
            scene.source.inject(Fault::StallAtStop);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_commit_neither_cancel_nor_deadline_has_an_effect() {
    let scene = Scene::new(true, true, Policy::default()).await;
    let before = Taken::by(&scene);
    scene.destination.inject(Fault::Refuse("cont".into()));
    scene.awaited().await;
    let id = MigrationId::new("late").unwrap();
    // Long enough for a commit on a busy machine.
    let deadline = Duration::from_secs(8);
    let spec = MigrateSpec { id: Some(id.clone()), deadline: Some(deadline), ..scene.spec() };
    let started = Instant::now();
    scene.a.engine.migrate(spec.clone()).await.unwrap();
    let journal = scene.b.dir.path().join("state/journal/late.destination.jsonl");
    while !std::fs::read_to_string(&journal).unwrap_or_default().contains("\"starting\"") {
        assert!(started.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // The same request again is the same migration.
    assert_eq!(scene.a.engine.migrate(spec).await.unwrap(), id);
    let cancel = scene.a.engine.cancel(&id);
    let heal = async {
        tokio::time::sleep_until((started + deadline + Duration::from_millis(500)).into()).await;
        assert!(!scene.source.is_running() && !scene.destination.is_running());
        scene.destination.heal();
    };
    let (cancelled, ()) = tokio::join!(cancel, heal);
    assert_eq!(cancelled.unwrap().phase, Phase::Completed);
    assert_eq!(ended(&scene.b.engine, &id).await.phase, Phase::Completed);
    scene.assert_moved();
    scene.leaves_no_more_than(&before).await;
}
