//! The real binary, from start to stop: each test has its own agent in its own folder, on ports of its own.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use dwcp_proto::handover::{AbortReason, Afterwards};
use dwcp_proto::journal::{self, Chain, Entry, Job, Prepared};
use dwcp_proto::{NodeKey, SessionId};
use dwcp_rpc::v1::migrations_client::MigrationsClient;
use dwcp_rpc::{failure, v1};
use hyper_util::rt::TokioIo;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// Longer than anything here takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn it_starts_serves_and_stops_cleanly() {
    let home = Home::new();
    let agent = home.start();

    assert_eq!(agent.get("/healthz"), (200, "ok\n".to_owned()));
    assert_eq!(agent.get("/readyz"), (200, "ready\n".to_owned()));
    assert_eq!(agent.get("/nothing").0, 404);
    assert_ne!(agent.listen.data.port(), 0);
    let socket = fs::metadata(home.socket()).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);

    assert!(agent.stop().success());
    assert!(!home.socket().exists());
    assert!(!home.path("state/listen.json").exists());
    // And again in the same place.
    assert!(home.start().stop().success());
}

#[test]
fn every_series_is_there_at_zero() {
    let home = Home::new();
    let agent = home.start();
    let (code, text) = agent.get("/metrics");
    assert_eq!(code, 200);
    for line in text.lines().filter(|l| l.starts_with("dwcp_") && !l.starts_with("dwcp_agent_")) {
        let one = line.starts_with("dwcp_build_info") || line.starts_with("dwcp_node_path{path=\"v1\"}");
        let (_, value) = line.rsplit_once(' ').unwrap();
        assert_eq!(value.parse::<f64>().unwrap(), f64::from(u8::from(one)), "{line}");
    }
    for series in [
        "dwcp_v3_operations_total{mode=\"internet\"} 0",
        "dwcp_v3_byzantine_successful_total 0",
        "dwcp_migrations_total{role=\"source\",path=\"v3\",outcome=\"completed\"} 0",
        "process_resident_memory_bytes",
        "# EOF",
    ] {
        assert!(text.contains(series), "{series} not in\n{text}");
    }
    assert!(agent.stop().success());
}

#[tokio::test]
async fn the_service_answers_and_says_what_it_cannot_do() {
    let home = Home::new();
    home.add_peer("hv-02");
    let agent = home.start();
    let mut client = client(&home.socket()).await;

    let node = client.node(v1::NodeRequest {}).await.unwrap().into_inner();
    assert_eq!((node.node.as_str(), node.ready), ("hv-01", true));
    assert_eq!(node.data_address, agent.listen.data.to_string());
    assert_eq!(node.peers.iter().map(|p| p.node.as_str()).collect::<Vec<_>>(), ["hv-02"]);
    let gate = node.gate.unwrap();
    assert_eq!((gate.source, gate.veto, gate.from.as_str()), (false, true, "none"));
    assert!(client.list(v1::ListRequest {}).await.unwrap().into_inner().migrations.is_empty());

    let unknown = client.get(v1::GetRequest { id: "m-1".to_owned() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert_eq!(failure::from_status(&unknown).unwrap().code, failure::UNKNOWN_MIGRATION);
    let bad = client.get(v1::GetRequest { id: "a/b".to_owned() }).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    let nothing = client.estimate(v1::EstimateRequest::default()).await.unwrap_err();
    assert_eq!(nothing.code(), Code::InvalidArgument);
    let huge = client.get(v1::GetRequest { id: "x".repeat(2 << 20) }).await.unwrap_err();
    assert_eq!(huge.code(), Code::OutOfRange, "{huge:?}");

    assert!(agent.stop().success());
}

#[tokio::test]
async fn a_decision_needs_a_migration_and_a_word() {
    use v1::Decision::{LeaveToPeer, Unspecified};
    let home = Home::new();
    let agent = home.start();
    let mut client = client(&home.socket()).await;
    for (decision, peer_fenced, code, expected) in [
        (Unspecified, false, Code::InvalidArgument, failure::BAD_REQUEST),
        (LeaveToPeer, true, Code::InvalidArgument, failure::BAD_REQUEST),
        (LeaveToPeer, false, Code::NotFound, failure::UNKNOWN_MIGRATION),
    ] {
        let id = "m-1".to_owned();
        let request = v1::ResolveRequest { id, decision: decision.into(), peer_fenced, act: true };
        let refused = client.resolve(request).await.unwrap_err();
        assert_eq!((refused.code(), code_of(&refused)), (code, expected.to_owned()));
    }
    let unknown = client.explain(v1::ExplainRequest { id: "m-1".to_owned() }).await.unwrap_err();
    assert_eq!((unknown.code(), code_of(&unknown).as_str()), (Code::NotFound, failure::UNKNOWN_MIGRATION));
    assert!(agent.stop().success());
}

#[tokio::test]
async fn a_migration_of_an_earlier_life_is_explained() {
    let home = Home::new();
    home.add_journal("m-1");
    let agent = home.start();
    let mut client = client(&home.socket()).await;
    assert!(client.list(v1::ListRequest {}).await.unwrap().into_inner().migrations.is_empty());
    let told = client.explain(v1::ExplainRequest { id: "m-1".to_owned() }).await.unwrap().into_inner();
    let [side] = told.sides.as_slice() else { panic!("{told:?}") };
    assert_eq!((side.vm.as_str(), side.peer.as_str(), side.role()), ("web-1", "hv-02", v1::Role::Source));
    assert_eq!((side.owner.as_str(), &side.status), ("source", &None));
    let times: Vec<_> = side.timeline.iter().map(|moment| (moment.unix_ms, moment.what.as_str())).collect();
    assert_eq!(times, [(1000, "prepared"), (2000, "aborted"), (3000, "done")]);
    assert!(side.cause.is_some() && !side.next.is_empty());
    assert!(agent.stop().success());
}

#[tokio::test]
async fn health_and_reflection_are_on() {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    const SERVICE: &str = "dwcp.agent.v1.Migrations";

    let home = Home::new();
    let agent = home.start();
    let channel = channel(&home.socket()).await;
    let request = HealthCheckRequest { service: SERVICE.to_owned() };
    let health = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);

    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers =
        ServerReflectionClient::new(channel).server_reflection_info(tokio_stream::once(request)).await;
    let answer = answers.unwrap().into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}")
    };
    assert!(list.service.iter().any(|service| service.name == SERVICE), "{list:?}");
    assert!(agent.stop().success());
}

#[test]
fn systemd_is_told() {
    let home = Home::new();
    let notify = home.path("notify.sock");
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let told_until = |what: &str| {
        let mut buffer = [0; 4096];
        loop {
            let length = socket.recv(&mut buffer).unwrap();
            let message = text(&buffer[..length]).to_owned();
            if message.lines().any(|line| line == what) {
                return message;
            }
        }
    };
    let agent = home.start_with(&[("NOTIFY_SOCKET", notify.to_str().unwrap()), ("WATCHDOG_USEC", "200000")]);
    told_until("READY=1");
    told_until("WATCHDOG=1");
    agent.signal("HUP");
    assert!(told_until("RELOADING=1").contains("MONOTONIC_USEC="));
    told_until("READY=1");
    agent.signal("TERM");
    told_until("STOPPING=1");
}

#[test]
fn logs_are_json_where_asked_for() {
    let home = Home::new();
    home.edit("[flags]", "[log]\nformat = \"json\"\n[flags]");
    let agent = home.start();
    let line: serde_json::Value = serde_json::from_str(&agent.last).unwrap();
    assert_eq!(
        (line["level"].as_str(), line["message"].as_str(), line["node"].as_str()),
        (Some("INFO"), Some("ready"), Some("hv-01"))
    );
}

#[test]
fn listed_cpus_are_all_that_any_thread_runs_on() {
    let allowed = |status: PathBuf| {
        let text = fs::read_to_string(status).ok()?;
        let list = text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(list.trim().to_owned())
    };
    // One that this test may run on, too: in a container that need not be 0.
    let own = allowed("/proc/self/status".into()).unwrap();
    let cpu = own.split([',', '-']).next().unwrap();
    let home = Home::new();
    home.edit("[flags]", &format!("[limits]\ncpus = \"{cpu}\"\nworkers = 3\n[flags]"));
    let agent = home.start();
    let tasks = fs::read_dir(format!("/proc/{}/task", agent.child.id())).unwrap();
    // A thread may end while they are looked at.
    let lists: Vec<String> = tasks.filter_map(|task| allowed(task.unwrap().path().join("status"))).collect();
    assert!(lists.len() >= 5, "main, a worker of the runtime and three codecs: {lists:?}");
    assert!(lists.iter().all(|list| list == cpu), "{lists:?}");
    assert!(agent.stop().success());
}

#[test]
fn sighup_reads_the_peers_again() {
    let home = Home::new();
    let mut agent = home.start();
    home.add_peer("hv-07");
    agent.signal("HUP");
    agent.log_until("hv-07");
    assert!(agent.stop().success());
}

#[test]
fn a_second_agent_is_refused_and_the_first_goes_on() {
    let home = Home::new();
    let agent = home.start();
    assert_refused(&home, "another dwcpd uses it", "");
    // A state folder of its own does not help: the socket is taken.
    let second = Home::with(&home.config_text().replace("/state\"", "/other\""));
    assert_refused(&second, "another process listens on it", "another dwcpd");
    assert_eq!(agent.get("/healthz").0, 200);
    assert!(home.socket().exists());
    assert!(agent.stop().success());
}

#[test]
fn a_killed_agent_leaves_nothing_that_bars_the_next() {
    let home = Home::new();
    let mut agent = home.start();
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    assert!(home.socket().exists());
    assert!(home.start().stop().success());
}

#[test]
fn what_is_wrong_at_the_start_is_said_with_what_to_do() {
    let home = Home::new();
    fs::set_permissions(home.path("hv-01.key"), fs::Permissions::from_mode(0o644)).unwrap();
    assert_refused(&home, "others may read it", "chmod 600");

    let home = Home::new();
    fs::remove_file(home.path("hv-01.key")).unwrap();
    assert_refused(&home, "hv-01.key", "dwcpctl keygen --node hv-01");

    let home = Home::new();
    fs::write(home.path("peers/hv-09.pub"), "nonsense").unwrap();
    assert_refused(&home, "hv-09.pub", "");

    let home = Home::new();
    fs::write(home.path("state"), "a file").unwrap();
    assert_refused(&home, "state folder", "");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (key, expected) in [("metrics", "metrics address"), ("data", "")] {
        let home = Home::new();
        home.edit(&format!("{key} = \"127.0.0.1:0\""), &format!("{key} = \"{address}\""));
        assert_refused(&home, &address, expected);
        assert!(!home.socket().exists());
    }

    let home = Home::new();
    home.edit("[flags]", "[flags]\nsource = \"https://127.0.0.1:1\"\nca = \"/nonexistent.pem\"");
    assert_refused(&home, "[flags] ca /nonexistent.pem", "PEM file");

    let home = Home::new();
    home.edit("[flags]", "[limits]\ncpus = \"1023\"\n[flags]");
    assert_refused(&home, "none of the CPUs 1023", "/sys/devices/system/cpu/online");
}

#[test]
fn check_config_finds_the_line_and_starts_nothing() {
    let home = Home::new();
    let check = |home: &Home| output(&["check-config", home.path("dwcpd.toml").to_str().unwrap()]);
    let sound = check(&home);
    assert!(sound.status.success(), "{sound:?}");
    assert!(!home.path("state").exists());

    fs::remove_file(home.path("hv-01.key")).unwrap();
    let keyless = check(&home);
    assert!(keyless.status.success() && text(&keyless.stdout).contains("not there yet"), "{keyless:?}");

    home.edit("[flags]", "[flag]");
    let wrong = check(&home);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(text(&wrong.stderr).contains("dwcpd.toml:13:2: unknown key `flag`"), "{}", text(&wrong.stderr));
    let served = output(&["--config", home.path("dwcpd.toml").to_str().unwrap()]);
    assert_eq!(served.status.code(), Some(2));
}

#[test]
fn version_and_usage() {
    assert!(text(&output(&["--version"]).stdout).contains(env!("CARGO_PKG_VERSION")));
    assert_eq!(output(&[]).status.code(), Some(2));
    assert_eq!(output(&["--nonsense"]).status.code(), Some(2));
}

/// An agent's folder: configuration, key, peers.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_str().unwrap();
        let config = format!(
            r#"node = "hv-01"
state_dir = "{root}/state"

[listen]
data = "127.0.0.1:0"
rpc = "unix:{root}/run/agent.sock"
metrics = "127.0.0.1:0"

[identity]
key = "{root}/hv-01.key"
peers = "{root}/peers"

[flags]
"#
        );
        Self::in_dir(dir, &config)
    }

    fn with(config: &str) -> Self {
        Self::in_dir(tempfile::tempdir().unwrap(), config)
    }

    fn in_dir(dir: tempfile::TempDir, config: &str) -> Self {
        let home = Home { dir };
        fs::write(home.path("dwcpd.toml"), config).unwrap();
        let key = NodeKey::from_seed("hv-01".parse().unwrap(), &[7; 32]);
        fs::write(home.path("hv-01.key"), key.to_text().as_bytes()).unwrap();
        fs::set_permissions(home.path("hv-01.key"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::create_dir(home.path("peers")).unwrap();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("run/agent.sock")
    }

    fn config_text(&self) -> String {
        fs::read_to_string(self.path("dwcpd.toml")).unwrap()
    }

    fn edit(&self, from: &str, to: &str) {
        let text = self.config_text();
        assert!(text.contains(from), "{from}");
        fs::write(self.path("dwcpd.toml"), text.replace(from, to)).unwrap();
    }

    fn add_peer(&self, node: &str) {
        let seed = [u8::try_from(node.len()).unwrap(); 32];
        let key = NodeKey::from_seed(node.parse().unwrap(), &seed).public();
        fs::write(self.path(&format!("peers/{node}.pub")), key.to_text()).unwrap();
    }

    /// The source's journal of a migration that was aborted long ago.
    fn add_journal(&self, id: &str) {
        let job = Job {
            migration: id.parse().unwrap(),
            vm: "web-1".parse().unwrap(),
            peer: "hv-02".parse().unwrap(),
            peer_key: [1; 32],
            peer_addr: None,
            qmp: "/run/web-1.qmp".to_owned(),
            session: SessionId([2; 32]),
            path: "v3".to_owned(),
            started_unix_ms: 1000,
            vmm: None,
            attempt: 1,
            again: None,
            halts: false,
        };
        let entries = [
            Entry::Prepared(Prepared { job, guest_ran: true, on_success: Afterwards::Leave }.into()),
            Entry::Aborted { reason: AbortReason::LinkLost },
            Entry::Done { moved: false },
        ];
        let mut chain = Chain::default();
        let lines = (1..).zip(&entries).map(|(second, entry)| {
            let line = journal::encode(entry, 1000 * second, &chain).unwrap();
            chain = line.next;
            line.text
        });
        let text: String = lines.collect();
        fs::create_dir_all(self.path("state/journal")).unwrap();
        fs::set_permissions(self.path("state"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(self.path(&format!("state/journal/{id}.source.jsonl")), text).unwrap();
    }

    /// Starts an agent and waits until it is ready.
    fn start(&self) -> Agent {
        self.start_with(&[])
    }

    fn start_with(&self, environment: &[(&str, &str)]) -> Agent {
        let mut child = Command::new(env!("CARGO_BIN_EXE_dwcpd"))
            .arg("--config")
            .arg(self.path("dwcpd.toml"))
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let any = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut agent = Agent { child, log, last: String::new(), listen: Listen { data: any, metrics: any } };
        agent.log_until("ready");
        agent.listen = serde_json::from_slice(&fs::read(self.path("state/listen.json")).unwrap()).unwrap();
        agent
    }
}

#[derive(serde::Deserialize)]
struct Listen {
    data: SocketAddr,
    metrics: SocketAddr,
}

/// A running agent; killed if a test fails.
struct Agent {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
    /// The line that was waited for last.
    last: String,
    listen: Listen,
}

impl Agent {
    /// Reads the log up to the line that contains `text`.
    fn log_until(&mut self, text: &str) {
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            // The agent's end closes the pipe, so this cannot wait for ever for a dead one.
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "no {text:?} in\n{seen}");
            if line.contains(text) {
                self.last = line;
                return;
            }
            seen += &line;
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    fn stop(mut self) -> ExitStatus {
        self.signal("TERM");
        let deadline = Instant::now() + PATIENCE;
        // A full pipe would hold the agent up.
        let mut rest = Vec::new();
        self.log.read_to_end(&mut rest).unwrap();
        assert!(Instant::now() < deadline, "slow stop:\n{}", text(&rest));
        self.child.wait().unwrap()
    }

    /// Status code and body.
    fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.listen.metrics).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn client(socket: &Path) -> MigrationsClient<Channel> {
    MigrationsClient::new(channel(socket).await)
}

async fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://agent").connect_with_connector(connector).await.unwrap()
}

/// The agent must end by itself, with status 1, and say so.
fn assert_refused(home: &Home, message: &str, hint: &str) {
    let output = output(&["--config", home.path("dwcpd.toml").to_str().unwrap()]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let error =
        said.lines().find(|l| l.starts_with("error: ")).unwrap_or_else(|| panic!("no error in\n{said}"));
    assert!(error.contains(message), "{message} not in\n{said}");
    assert!(said.contains(hint), "{hint} not in\n{said}");
}

/// Runs the binary to its end, which must come soon.
fn output(args: &[&str]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dwcpd"))
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{args:?} did not end: {:?}", child.wait_with_output().unwrap());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

fn code_of(status: &tonic::Status) -> String {
    failure::from_status(status).unwrap().code
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}
