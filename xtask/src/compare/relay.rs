//! Two socats in the place of the two agents: unix socket, TCP, unix socket.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dwcp_tests::{Kit, until};

use crate::apt::{Apt, RELEASE};
use crate::run::{installed, output};

/// From the start of a socat to its listening.
const START: Duration = Duration::from_secs(10);

/// A socat to run: the machine's, or Debian's unpacked in the laboratory.
pub(crate) struct Socat {
    root: Option<PathBuf>,
}

impl Socat {
    /// Finds it on the path or in the laboratory, or fetches it into the latter.
    ///
    /// # Errors
    /// No mirror of Debian's in reach.
    pub(crate) fn ensure(kit: &Kit) -> Result<Self> {
        if installed("socat") {
            return Ok(Socat { root: None });
        }
        let root = kit.folder().join("socat");
        let socat = Socat { root: Some(root.clone()) };
        if socat.version().is_err() {
            println!("fetching socat from Debian's mirror, once");
            let apt = Apt::open(&kit.folder().join("apt-socat"))?;
            apt.unpack_with_dependencies(RELEASE, "socat", &root)?;
            fs::remove_dir_all(kit.folder().join("apt-socat"))?;
            socat.version()?;
        }
        Ok(socat)
    }

    /// Such as `1.7.4.4`.
    pub(crate) fn version(&self) -> Result<String> {
        let said = output(self.command().arg("-V"))?;
        let version = said.split_whitespace().skip_while(|word| *word != "version").nth(1);
        Ok(version.context("socat -V names no version")?.to_owned())
    }

    /// It dies with the thread that starts it.
    fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        match &self.root {
            None => command.arg("socat"),
            Some(root) => {
                let libraries = root.join("usr/lib/x86_64-linux-gnu");
                command.arg(root.join("usr/bin/socat")).env("LD_LIBRARY_PATH", libraries)
            }
        };
        command
    }

    /// A socat from `from` to `to`, and where it listens, as it says itself.
    fn start(&self, buffer: Option<u32>, from: &str, to: &str, log: &Path) -> Result<(Process, String)> {
        let mut command = self.command();
        if let Some(bytes) = buffer {
            command.arg("-b").arg(bytes.to_string());
        }
        // Twice: it tells when it listens, and nothing about the data.
        command.args(["-d", "-d", from, to]).stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = Process(command.stderr(File::create(log)?).spawn().context("start socat")?);
        let listens = until("socat to listen", START, || {
            let said = fs::read_to_string(log)?;
            if let Some(status) = process.0.try_wait()? {
                bail!("socat ended with {status}: {said}");
            }
            let line = said.lines().find(|line| line.contains("listening on AF="));
            Ok(line.and_then(|line| line.split_whitespace().next_back()).map(str::to_owned))
        })?;
        Ok((process, listens))
    }
}

/// Two socats that wait for one connection; killed when dropped.
pub(crate) struct Relay {
    source: Process,
    destination: Process,
}

impl Relay {
    /// Listens on the unix socket `from` and carries what comes over TCP on the loopback to the unix socket `to`, both ways.
    /// `buffer` is socat's `-b`.
    pub(crate) fn start(socat: &Socat, buffer: Option<u32>, from: &Path, to: &Path) -> Result<Self> {
        let unix = |kind: &str, path: &Path| format!("{kind}:{}", path.display());
        let (destination, address) = socat.start(
            buffer,
            "TCP-LISTEN:0,bind=127.0.0.1",
            &unix("UNIX-CONNECT", to),
            &to.with_extension("socat.log"),
        )?;
        let (source, _) = socat.start(
            buffer,
            &unix("UNIX-LISTEN", from),
            &format!("TCP:{address}"),
            &from.with_extension("socat.log"),
        )?;
        Ok(Relay { source, destination })
    }

    /// Both process ids.
    pub(crate) fn pids(&self) -> [u32; 2] {
        [self.source.0.id(), self.destination.0.id()]
    }
}

/// Killed when dropped. Until then its CPU time can be read, even after it has ended.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
