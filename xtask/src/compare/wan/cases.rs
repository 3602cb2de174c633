//! What is compared: guests, links, settings.

use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;
use dwcp_tests::{Backing, GuestLoad, Kit, LineProfile, Mix, QemuSpec, QemuVersion, Role};
use serde::{Deserialize, Serialize};

use super::debian;

/// RAM beside what is under test, in MiB: the guest's kernel and what it keeps of its own.
const BESIDE_MIB: u32 = 256;
/// Data connections of QEMU's multifd.
pub(super) const CHANNELS: u32 = 2;
/// QEMU's cache for XBZRLE in bytes.
pub(super) const XBZRLE_CACHE: u64 = 256 << 20;

/// What the guest does while it is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Guest {
    /// 2 GiB with a Debian userland in RAM, redis under load and a compiler in a loop
    Debian,
    /// 512 MiB of mixed pages, 64 bytes rewritten in each of 20,000 pages a second over 256 MiB
    Writes,
    /// 512 MiB of random bytes, nothing rewritten
    Dense,
    /// 512 MiB of mixed pages, nothing rewritten
    Idle,
}

impl Guest {
    /// All of them.
    pub(super) const ALL: [Guest; 4] = [Guest::Debian, Guest::Writes, Guest::Dense, Guest::Idle];

    /// In the words of a table.
    pub(super) fn title(self) -> &'static str {
        match self {
            Guest::Debian => "Debian guest: 2 GiB, redis under load, a compiler in a loop",
            Guest::Writes => {
                "write-heavy guest: 512 MiB of mixed pages, 20,000 of them rewritten a second over 256 MiB"
            }
            Guest::Dense => "incompressible guest: 512 MiB of random bytes",
            Guest::Idle => "idle guest: 512 MiB of mixed pages",
        }
    }

    /// Its machine.
    ///
    /// # Errors
    /// What it needs from Debian cannot be fetched.
    pub(super) fn spec(self, kit: &Kit) -> Result<QemuSpec> {
        let mixed = GuestLoad { mib: 512, check: 10_000, ..GuestLoad::default() };
        let load = match self {
            Guest::Debian => GuestLoad { mib: 32, check: 2000, ..mixed }.idle(),
            Guest::Writes => GuestLoad { rate: 20_000, bytes: 64, hot_mib: 256, ..mixed },
            Guest::Dense => GuestLoad { mix: Mix::Random, ..mixed }.idle(),
            Guest::Idle => mixed.idle(),
        };
        let (ram_mib, initramfs) = match self {
            Guest::Debian => (2048, Some(debian::initramfs(kit)?)),
            _ => (load.mib + BESIDE_MIB, None),
        };
        let spec = QemuSpec::new(QemuVersion::V10_0, Role::Source);
        Ok(QemuSpec { ram_mib, prealloc: true, backing: Backing::shared_file(), load, initramfs, ..spec })
    }
}

/// The line between source and destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Link {
    /// 200 Mbit/s, 20 ms there and back
    #[value(name = "200m")]
    M200,
    /// 1 Gbit/s, 10 ms there and back
    #[value(name = "1g")]
    G1,
    /// 100 Mbit/s, 100 ms there and back, one packet of 200 lost
    #[value(name = "lossy")]
    Lossy,
}

impl Link {
    /// All of them.
    pub(super) const ALL: [Link; 3] = [Link::M200, Link::G1, Link::Lossy];

    /// In the words of a table.
    pub(super) fn title(self) -> &'static str {
        match self {
            Link::M200 => "200 Mbit/s, 20 ms",
            Link::G1 => "1 Gbit/s, 10 ms",
            Link::Lossy => "100 Mbit/s, 100 ms, 0.5 % lost",
        }
    }

    /// There and back.
    pub(super) fn round_trip(self) -> Duration {
        Duration::from_millis(match self {
            Link::M200 => 20,
            Link::G1 => 10,
            Link::Lossy => 100,
        })
    }

    /// As the laboratory's line takes it.
    pub(super) fn profile(self) -> LineProfile {
        let (rate, loss_ppm) = match self {
            Link::M200 => (200_000_000, 0),
            Link::G1 => (1_000_000_000, 0),
            Link::Lossy => (100_000_000, 5000),
        };
        LineProfile { loss_ppm, ..LineProfile::new(rate, self.round_trip() / 2) }
    }
}

/// Who carries the guest's memory, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Setting {
    /// QEMU to QEMU, no capability set
    Plain,
    /// QEMU to QEMU with xbzrle and a cache of 256 MiB
    Xbzrle,
    /// QEMU to QEMU with multifd over 2 connections, zstd level 1
    Zstd1,
    /// QEMU to QEMU with multifd over 2 connections, zstd level 3
    Zstd3,
    /// The agents, path v1
    V1,
    /// The agents, path v3 in internet mode; the destination's RAM is a shared memfd
    V3Mapped,
    /// The agents, path v3 in internet mode; the destination's RAM is QEMU's own
    V3Cache,
    /// As v3-mapped, and the source's agent reads the guest's RAM itself
    V3Direct,
}

impl Setting {
    /// All of them.
    pub(super) const ALL: [Setting; 8] = [
        Setting::Plain,
        Setting::Xbzrle,
        Setting::Zstd1,
        Setting::Zstd3,
        Setting::V1,
        Setting::V3Mapped,
        Setting::V3Cache,
        Setting::V3Direct,
    ];

    /// In the words of a table.
    pub(super) fn title(self) -> &'static str {
        match self {
            Setting::Plain => "QEMU, plain",
            Setting::Xbzrle => "QEMU, xbzrle",
            Setting::Zstd1 => "QEMU, multifd zstd-1",
            Setting::Zstd3 => "QEMU, multifd zstd-3",
            Setting::V1 => "agents, v1",
            Setting::V3Mapped => "agents, v3, mapped RAM",
            Setting::V3Cache => "agents, v3, cache",
            Setting::V3Direct => "agents, v3, direct, mapped RAM",
        }
    }

    /// The path of the agents; `None` where there are none.
    pub(super) fn path(self) -> Option<&'static str> {
        match self {
            Setting::V1 => Some("v1"),
            Setting::V3Mapped | Setting::V3Cache | Setting::V3Direct => Some("v3"),
            _ => None,
        }
    }

    /// What the destination's RAM is made of.
    pub(super) fn destination(self) -> Backing {
        match self {
            Setting::V3Mapped | Setting::V3Direct => Backing::Memfd,
            _ => Backing::Anonymous,
        }
    }

    /// Where the source's agent reads pages.
    pub(super) fn source(self) -> &'static str {
        if self == Setting::V3Direct { "direct" } else { "stream" }
    }

    /// The level of QEMU's own zstd.
    pub(super) fn zstd(self) -> Option<u32> {
        match self {
            Setting::Zstd1 => Some(1),
            Setting::Zstd3 => Some(3),
            _ => None,
        }
    }
}
