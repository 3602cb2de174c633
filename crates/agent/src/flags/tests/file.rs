//! A flag document in a file.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dwcp_flags::{FlagState, Source};
use dwcp_migrate::Gate;
use tokio::sync::Notify;

use crate::flags::file::{FileFollower, Watch};
use crate::flags::keeper::Keeper;
use crate::flags::metrics::FlagMetrics;

async fn follower(path: &Path) -> FileFollower {
    let keeper = Keeper::new("hv-01", FlagState::new("hv-01", Source::File), Duration::from_secs(60));
    FileFollower::start(path, keeper, FlagMetrics::new()).await
}

fn v3(gate: &Gate) -> bool {
    gate.source.new == dwcp_proto::Path::V3
}

fn document(percentage: u8, more: &str) -> String {
    format!(r#"{{"feature":"dwcp_v3_hde","percentage":{percentage},"enabled":true{more}}}"#)
}

#[tokio::test(start_paused = true)]
async fn a_file_is_obeyed_and_a_bad_one_means_v1() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flag.json");
    let mut file = follower(&path).await;
    let mut gate = async || {
        file.look().await;
        file.keeper().gate().borrow().clone()
    };
    let none = gate().await;
    assert!(!v3(&none) && none.source.reason.text.contains("flag.json"), "{none:?}");

    fs::write(&path, document(100, r#","epoch":{"incarnation":1,"counter":7}"#)).unwrap();
    let on = gate().await;
    assert_eq!((v3(&on), on.veto.as_ref(), on.epoch), (true, None, (1, 7)), "{on:?}");

    fs::write(&path, "{\"percentage\": 10,  # or 0\n}").unwrap();
    let bad = gate().await;
    assert!(!v3(&bad) && bad.source.reason.text.contains("line 1"), "{bad:?}");

    fs::write(&path, document(0, "")).unwrap();
    let off = gate().await;
    assert!(!v3(&off) && off.veto.is_some(), "{off:?}");
    // Bad again: what was last known still restricts.
    fs::write(&path, "").unwrap();
    assert!(gate().await.veto.is_some());

    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let folder = gate().await;
    assert!(!v3(&folder) && folder.source.reason.text.contains("not a regular file"), "{folder:?}");

    fs::remove_dir(&path).unwrap();
    fs::write(&path, document(100, r#","epoch":{"incarnation":1,"counter":6}"#)).unwrap();
    let old = gate().await;
    assert!(!v3(&old) && old.source.reason.text.contains("lower than 1.7"), "{old:?}");
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_being_written_is_not_taken_for_a_bad_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flag.json");
    fs::write(&path, document(100, "")).unwrap();
    let mut file = follower(&path).await;
    let gate = file.keeper().gate();
    fs::write(&path, "").unwrap();
    let writer = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(v3(&gate.borrow()));
        fs::write(&path, document(99, "")).unwrap();
    };
    tokio::join!(file.look(), writer);
    assert!(v3(&gate.borrow()) == (dwcp_flags::bucket(dwcp_flags::FEATURE, "hv-01") <= 99));
    assert!(!gate.borrow().source.reason.text.contains("cannot be read"));
}

#[tokio::test(start_paused = true)]
async fn a_change_reaches_the_gate_without_being_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flag.json");
    fs::write(&path, document(100, "")).unwrap();
    let file = follower(&path).await;
    let mut gate = file.keeper().gate();
    let task = tokio::spawn(file.follow(Arc::new(Notify::new())));
    assert!(v3(&gate.borrow()));
    fs::write(&path, document(100, r#","excluded":["hv-01"]"#)).unwrap();
    let changed = gate.wait_for(|gate| !v3(gate)).await.unwrap().clone();
    assert!(changed.veto.as_ref().is_some_and(|veto| veto.text.contains("excludes")), "{changed:?}");
    task.abort();
}

#[tokio::test]
async fn every_way_of_writing_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, fresh) = (dir.path().join("flag.json"), dir.path().join("fresh"));
    let watch = Watch::new(dir.path()).unwrap();
    let noticed = async |how: &str| {
        let long = Duration::from_secs(20);
        tokio::time::timeout(long, watch.changed()).await.unwrap_or_else(|_| panic!("not noticed: {how}"));
    };
    fs::write(&path, "1").unwrap();
    noticed("made").await;
    fs::write(&path, "2").unwrap();
    noticed("written in place").await;
    fs::write(&fresh, "3").unwrap();
    noticed("another file").await;
    fs::rename(&fresh, &path).unwrap();
    noticed("replaced").await;
    fs::remove_file(&path).unwrap();
    noticed("removed").await;

    // The folder itself is replaced: as soon as it is looked at again, the new one is watched.
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    let watch = Watch::new(&folder).unwrap();
    fs::remove_dir(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    watch.renew();
    fs::write(folder.join("flag.json"), "4").unwrap();
    tokio::time::timeout(Duration::from_secs(20), watch.changed()).await.unwrap();
}
