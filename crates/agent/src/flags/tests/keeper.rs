//! What time alone changes.

use std::time::Duration;

use dwcp_flags::{FEATURE, FlagDocument, LEASE};
use dwcp_proto::Path;

use super::scripted::{document, keeper, pass};

/// A poll that falls due, or fails, at the very moment at which the lease ends must not cover up its end.
#[tokio::test(start_paused = true)]
async fn a_lease_ends_on_time_whatever_else_happens_then() {
    // Which of the two is seen first is left to chance.
    for _ in 0..64 {
        let mut keeper = keeper();
        let gate = keeper.gate();
        let document = FlagDocument::parse(document(100, 1, "").as_bytes(), FEATURE).unwrap();
        keeper.apply(document, keeper.clock().now()).unwrap();
        assert_eq!(gate.borrow().source.new, Path::V3);
        keeper.during(tokio::time::sleep(LEASE)).await;
        keeper.during(pass(0.001)).await;
        assert_eq!(gate.borrow().source.new, Path::V1);
        tokio::time::advance(Duration::from_secs(1)).await;
    }
}
