//! A server in a folder of its own.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The name in the certificate: the one that the plans print.
pub(crate) const HOST: &str = "api.novacron.io";

const PROGRAM: &str = env!("CARGO_BIN_EXE_dwcp-control");
/// For anything that takes a moment, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A folder with a token.
pub(crate) struct Setup {
    folder: TempDir,
    pub(crate) token: String,
}

/// A running server, killed when it is dropped.
pub(crate) struct Server {
    process: Child,
    pub(crate) address: SocketAddr,
}

impl Setup {
    pub(crate) fn new() -> Self {
        let mut setup = Setup { folder: tempfile::tempdir().unwrap(), token: String::new() };
        let file = setup.path("tokens");
        let new = ["token", "new", "--name", "admin", "--roles", "admin", "--file", file.to_str().unwrap()];
        setup.token = setup.run(&new).lines().last().unwrap().to_owned();
        setup
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the program to its end, which must be a good one; what it printed.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same, but it must fail; what it said.
    pub(crate) fn fail(&self, arguments: &[&str]) -> String {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    pub(crate) fn start(&self) -> Server {
        self.start_at(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub(crate) fn start_at(&self, address: SocketAddr) -> Server {
        self.launch(address, &[])
    }

    /// With a certificate for [`HOST`] in `cert.pem`, which signs itself.
    pub(crate) fn start_with_tls(&self) -> Server {
        let signed = rcgen::generate_simple_self_signed([HOST.to_owned()]).unwrap();
        let (cert, key) = (self.path("cert.pem"), self.path("key.pem"));
        std::fs::write(&cert, signed.cert.pem()).unwrap();
        std::fs::write(&key, signed.signing_key.serialize_pem()).unwrap();
        let tls = ["--tls-cert", cert.to_str().unwrap(), "--tls-key", key.to_str().unwrap()];
        self.launch(SocketAddr::from(([127, 0, 0, 1], 0)), &tls)
    }

    fn launch(&self, address: SocketAddr, more: &[&str]) -> Server {
        let mut process = Command::new(PROGRAM)
            .args(["serve", "--listen", &address.to_string()])
            .arg("--state")
            .arg(self.path("state"))
            .arg("--admin-token-file")
            .arg(self.path("tokens"))
            .args(more)
            .env_remove("RUST_LOG")
            .env_remove("DWCP_LOG_FORMAT")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let address = lines.by_ref().find_map(|line| {
            let address =
                line.split_once("ready address=").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
            said.push(line);
            address
        });
        // A pipe that nobody reads would stop it.
        std::thread::spawn(move || lines.for_each(drop));
        let Some(address) = address else {
            let _ = process.wait();
            panic!("the server did not start: {said:#?}");
        };
        Server { process, address }
    }
}

impl Server {
    pub(crate) fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        kill_process(id, signal).unwrap();
    }

    /// Kills it, without a word.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Stops it, as systemd does; it must end well.
    pub(crate) fn stop(mut self) {
        self.signal(Signal::TERM);
        assert!(self.process.wait().unwrap().success());
    }

    /// Waits for what the server does by itself.
    pub(crate) fn wait_for(&self, holds: impl Fn() -> bool) {
        let began = Instant::now();
        while !holds() {
            assert!(began.elapsed() < LIMIT, "it does not happen");
            std::thread::yield_now();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
