//! What QMP answers, in types that tolerate what they do not know.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A version of QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
    /// The packager's words, perhaps empty.
    pub package: String,
}

impl Version {
    pub(super) fn parse(value: &Value) -> Option<Self> {
        let part = |part: &str| value["qemu"][part].as_u64().and_then(|n| u32::try_from(n).ok());
        let package = value["package"].as_str().unwrap_or_default().trim().to_owned();
        Some(Version { major: part("major")?, minor: part("minor")?, micro: part("micro")?, package })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

macro_rules! open_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(from = "String", into = "String")]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$vdoc])* $variant,)+
            /// One that this version of the agent does not know.
            Other(String),
        }

        impl $name {
            /// QMP's word for it.
            pub fn as_str(&self) -> &str {
                match self {
                    $($name::$variant => $text,)+
                    $name::Other(text) => text,
                }
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                match text {
                    $($text => $name::$variant,)+
                    other => $name::Other(other.to_owned()),
                }
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                text.as_str().into()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.as_str().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

open_enum!(
    /// QEMU's run state.
    RunState {
        /// The guest runs.
        Running = "running",
        /// Stopped by QMP.
        Paused = "paused",
        /// Started with `-S` and never run.
        Prelaunch = "prelaunch",
        /// Waits for an incoming migration.
        InMigrate = "inmigrate",
        /// Stopped for the last round of a migration.
        FinishMigrate = "finish-migrate",
        /// Migrated away; stopped until an explicit `cont`.
        PostMigrate = "postmigrate",
        /// The guest sleeps (S3).
        Suspended = "suspended",
        /// The guest powered down.
        Shutdown = "shutdown",
        /// Stopped by an I/O error.
        IoError = "io-error",
        /// Stopped by an error in the VMM.
        InternalError = "internal-error",
        /// Stopped by a panic of the guest.
        GuestPanicked = "guest-panicked",
    }
);

open_enum!(
    /// State of a migration.
    MigrationStatus {
        /// None was begun.
        None = "none",
        /// Being set up; on 10.0 also a destination that listens.
        Setup = "setup",
        /// In precopy.
        Active = "active",
        /// In postcopy.
        PostcopyActive = "postcopy-active",
        /// Waits before the switchover.
        PreSwitchover = "pre-switchover",
        /// The guest is stopped; RAM's rest and devices are being sent.
        Device = "device",
        /// Done.
        Completed = "completed",
        /// Ended by an error.
        Failed = "failed",
        /// Being cancelled.
        Cancelling = "cancelling",
        /// Cancelled.
        Cancelled = "cancelled",
    }
);

impl MigrationStatus {
    /// Whether it will not change any more.
    pub fn is_final(&self) -> bool {
        matches!(self, MigrationStatus::Completed | MigrationStatus::Failed | MigrationStatus::Cancelled)
    }
}

/// Answer to `query-migrate`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MigrationInfo {
    /// `None` before any migration.
    pub status: Option<MigrationStatus>,
    /// RAM counters, where there are some.
    pub ram: Option<RamProgress>,
    /// How long the guest was stopped, by the source's own account, once completed.
    pub downtime: Option<Duration>,
    /// How long the guest would be stopped if the last round began now, by the source's own estimate.
    pub expected_downtime: Option<Duration>,
    /// How long it has taken or took.
    pub total_time: Option<Duration>,
    /// Why it failed.
    pub error: Option<String>,
    /// Why this VM cannot be migrated; empty if it can.
    pub blocked_reasons: Vec<String>,
    /// Whether a destination listens on a socket already.
    pub listening: bool,
}

/// Progress of RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RamProgress {
    /// Bytes of guest RAM.
    pub total: u64,
    /// Bytes of guest RAM still to send in this round.
    pub remaining: u64,
    /// Bytes written to the stream.
    pub transferred: u64,
    /// How often the dirty bitmap was synchronised: rounds begun.
    pub dirty_sync_count: u64,
    /// Pages that the guest dirties each second, as last measured.
    pub dirty_pages_rate: u64,
    /// Pages found to be zero.
    pub zero_pages: u64,
    /// Pages sent whole.
    pub normal_pages: u64,
    /// Bytes of a page.
    pub page_size: u64,
    /// Throughput in Mbit/s, as last measured.
    pub mbps: f64,
}

impl MigrationInfo {
    pub(super) fn parse(value: &Value) -> Self {
        let millis = |key: &str| value[key].as_u64().map(Duration::from_millis);
        let reasons = value["blocked-reasons"].as_array().map_or(&[][..], Vec::as_slice);
        MigrationInfo {
            status: value["status"].as_str().map(MigrationStatus::from),
            ram: value.get("ram").map(RamProgress::parse),
            downtime: millis("downtime"),
            expected_downtime: millis("expected-downtime"),
            total_time: millis("total-time"),
            error: value["error-desc"].as_str().map(str::to_owned),
            blocked_reasons: reasons.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            listening: value["socket-address"].as_array().is_some_and(|list| !list.is_empty()),
        }
    }
}

impl RamProgress {
    fn parse(value: &Value) -> Self {
        let number = |key: &str| value[key].as_u64().unwrap_or_default();
        RamProgress {
            total: number("total"),
            remaining: number("remaining"),
            transferred: number("transferred"),
            dirty_sync_count: number("dirty-sync-count"),
            dirty_pages_rate: number("dirty-pages-rate"),
            zero_pages: number("duplicate"),
            normal_pages: number("normal"),
            page_size: number("page-size"),
            mbps: value["mbps"].as_f64().unwrap_or_default(),
        }
    }
}

/// A disk that is plugged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The device's name, or its QOM path where it has none.
    pub device: String,
    /// The image's file or URL.
    pub file: String,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
}

impl Disk {
    /// Whether the image is on this host, as far as its name tells: a path, not a network protocol. A path may be on
    /// shared storage all the same, which only the operator knows.
    pub fn is_local(&self) -> bool {
        if self.file.starts_with('/') {
            return true;
        }
        const NETWORK: [&str; 14] = [
            "nbd",
            "nbd+unix",
            "rbd",
            "iscsi",
            "gluster",
            "gluster+tcp",
            "nfs",
            "ssh",
            "http",
            "https",
            "ftp",
            "sheepdog",
            "nvme-of",
            "vxhs",
        ];
        let scheme = self.file.split_once(':').map(|(scheme, _)| scheme);
        let json = self.file.strip_prefix("json:");
        match (json, scheme) {
            (Some(json), _) => !NETWORK.iter().any(|n| json.contains(&format!("\"driver\": \"{n}\""))),
            (None, Some(scheme)) => !NETWORK.contains(&scheme),
            (None, None) => true,
        }
    }
}

/// A memory backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBackend {
    /// Its id; `None` for an anonymous one.
    pub id: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Whether other processes see what is written to it.
    pub share: bool,
    /// Whether all its pages were allocated at the start.
    pub prealloc: bool,
}
