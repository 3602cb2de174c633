//! What one migration has counted; written by its tasks, read by whoever asks for its status.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use dwcp_hde::Stats;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Shared counters of one migration. Bytes unless named otherwise.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
            /// What the layers of HDE did to the chunks that were encoded.
            pub(crate) encoded: Mutex<Stats>,
        }
    };
}

counters! {
    /// Bytes of the VMM's stream that were carried.
    raw,
    /// Bytes given to the network, sent again or not.
    wire,
    /// Guest memory that was carried, zero pages at full size.
    guest,
    /// Rounds over RAM begun.
    rounds,
    /// Chunks, once each.
    chunks,
    /// Chunks sent again.
    retransmitted,
    /// Connections made again.
    reconnects,
    /// The least round trip on the control connection, microseconds.
    rtt_us,
    /// The least round trip there of late, microseconds.
    rtt_now_us,
    /// Bytes a second that the peer acknowledged lately.
    rate,
}

/// One counter.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    pub(crate) fn load(&self) -> u64 {
        self.0.load(Relaxed)
    }
}
