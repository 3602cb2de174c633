//! Two network namespaces that face each other, for agents that shall not meet on the loopback.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::wait::until;

/// For a namespace to be there.
const SETUP: Duration = Duration::from_secs(10);

/// One of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The first.
    A,
    /// The second.
    B,
}

impl End {
    /// Both.
    pub const ALL: [End; 2] = [End::A, End::B];

    /// Its address: of the network that is set aside for documentation.
    pub fn address(self) -> IpAddr {
        IpAddr::V4(match self {
            End::A => Ipv4Addr::new(192, 0, 2, 1),
            End::B => Ipv4Addr::new(192, 0, 2, 2),
        })
    }

    /// The name of its network device.
    pub(crate) fn device(self) -> &'static str {
        match self {
            End::A => "dwcp-a",
            End::B => "dwcp-b",
        }
    }
}

/// The two namespaces, empty but for the loopback, each held by a process; they are gone when this is dropped.
#[derive(Debug)]
pub(crate) struct Namespaces([Child; 2]);

impl Namespaces {
    /// Makes both.
    pub(crate) fn start() -> Result<Self> {
        let hold = || namespace(&["sleep", "infinity"]).spawn();
        let ends = Namespaces([hold()?, hold()?]);
        let mine = fs::read_link("/proc/self/ns/net")?;
        for end in End::ALL {
            until("a network namespace", SETUP, || {
                Ok(fs::read_link(ends.namespace(end)).ok().filter(|theirs| *theirs != mine))
            })?;
        }
        Ok(ends)
    }

    /// The process that holds one.
    pub(crate) fn pid(&self, end: End) -> u32 {
        match end {
            End::A => self.0[0].id(),
            End::B => self.0[1].id(),
        }
    }

    /// One of them, as `nsenter --net=` takes it.
    pub(crate) fn namespace(&self, end: End) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid(end)))
    }

    /// Gives an end's device its address and turns it on; it is in the namespace already.
    pub(crate) fn configure(&self, end: End) -> Result<()> {
        let (device, address) = (end.device(), format!("{}/30", end.address()));
        self.ip(end, &["link", "set", "lo", "up"])?;
        self.ip(end, &["link", "set", device, "mtu", "1500", "up"])?;
        self.ip(end, &["address", "add", &address, "dev", device])
    }

    /// Runs `ip` in one of them.
    pub(crate) fn ip(&self, end: End, arguments: &[&str]) -> Result<()> {
        let status = entering(&self.namespace(end)).arg("ip").args(arguments).status()?;
        ensure!(status.success(), "ip {arguments:?} ended with {status}");
        Ok(())
    }

    /// Runs `work` on a thread in one of them.
    pub(crate) fn within<T: Send>(&self, end: End, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(&self.namespace(end), work)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        // A namespace and all that is in it goes with the process that holds it.
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Two namespaces joined by a cable as fast as the machine (a veth pair); gone when this is dropped.
#[derive(Debug)]
pub struct Cable(Namespaces);

impl Cable {
    /// Lays it.
    ///
    /// # Errors
    /// Not root, or no iproute2, or the kernel has no veth.
    pub fn start() -> Result<Self> {
        ensure!(fs::metadata("/proc/self")?.uid() == 0, "network namespaces need root");
        let ends = Namespaces::start()?;
        let [a, b] = End::ALL.map(End::device);
        let there = ends.pid(End::B).to_string();
        ends.ip(End::A, &["link", "add", a, "type", "veth", "peer", "name", b, "netns", &there])?;
        for end in End::ALL {
            ends.configure(end)?;
        }
        Ok(Cable(ends))
    }

    /// The network namespace of an end, as `nsenter --net=` takes it.
    pub fn namespace(&self, end: End) -> PathBuf {
        self.0.namespace(end)
    }
}

/// Runs `work` on a thread in a network namespace.
pub(crate) fn within<T: Send>(namespace: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(namespace)?;
    std::thread::scope(|scope| {
        let there = scope.spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .context("enter a network namespace")?;
            work()
        });
        there.join().map_err(|_| anyhow!("the thread in the namespace panicked"))?
    })
}

/// A command that runs in a network namespace, before its own words.
pub(crate) fn entering(namespace: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.display()));
    command
}

/// A command in a network namespace of its own, which dies with the thread that starts it.
pub(crate) fn namespace(words: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--net"]).args(words).stdin(Stdio::null());
    command
}
