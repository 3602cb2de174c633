//! Real agents follow the flag: servers that answer, fall silent, lie and come back, and a file that is replaced.
//!
//! What is decided when is tested under a simulated clock in the agent's own tests; here are real sockets, real files and the
//! real clock, so nothing but the order of things is asserted.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dwcp_tests::{Agent, AgentConfig, target_dir, until};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

/// Longer than any of it takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(30);
/// Where everything is.
const HOST: &str = "127.0.0.1";

#[test]
fn a_flag_server_is_followed_and_its_silence_costs_the_lease() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let server = Server::start()?;
    server.says(&document(100, 1));
    // Nobody listens at the first endpoint.
    let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let agent = agent(&dir, &format!("http://{closed}, http://{}", server.address))?;
    until_flags(&agent, "v3", |flags| flags["value"] == true)?;

    let flags = flags(&agent)?;
    ensure!(flags["endpoint"] == format!("http://{}", server.address), "{flags}");
    ensure!(
        (flags["cluster"].as_str(), &flags["epoch"]) == (Some("c1"), &serde_json::json!([1, 1])),
        "{flags}"
    );
    ensure!(flags["error"].as_str().is_some_and(|error| error.contains("cannot connect")), "{flags}");
    let number = |key: &str| flags[key].as_f64().context("no number");
    ensure!(number("age_seconds")? < 3.0 && number("lease_seconds")? > 0.0, "{flags}");
    let said = agent.ctl(&[&"flags"])?.success()?.stdout;
    ensure!(said.contains("new         v3: bucket ") && said.contains("epoch       1.1\n"), "{said}");
    let metrics = agent.http_get("/metrics")?;
    for line in [
        "dwcp_node_path{path=\"v3\"} 1",
        "dwcp_flag_epoch{part=\"counter\"} 1",
        "dwcp_flag_refused_total{reason=\"lower_epoch\"} 0",
    ] {
        ensure!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    ensure!(server.last_request().to_lowercase().contains("\r\ndwcp-report: "), "{}", server.last_request());

    server.says("");
    until_flags(&agent, "the lease's end", |flags| flags["reason_code"] == "flag_lease_expired")?;
    ensure!(flags_of(&agent, "running")? == "keep");
    server.says(&document(100, 1));
    until_flags(&agent, "its return", |flags| flags["value"] == true)?;

    // Off: within a poll, which is what the five seconds are made of.
    let start = Instant::now();
    server.says(&document(0, 2));
    until_flags(&agent, "off", |flags| flags["value"] == false)?;
    eprintln!("off was obeyed after {:.2} s", start.elapsed().as_secs_f64());
    ensure!(flags_of(&agent, "veto_code")? == "flag_disabled");
    until_metric(&agent, "dwcp_node_path{path=\"v1\"} 1")
}

/// The real control plane, over TLS and with a key of its own: it hears from the node what it has applied.
#[test]
fn the_control_plane_knows_who_has_applied_what() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let control = Control::start(dir.path())?;
    let mut agent = Agent::prepare(dir.path(), "hv-01", AgentConfig::default())?;
    agent.config_mut().flags = format!("https://{}", control.address);
    // Somebody else's certificate: what this server says is not even read.
    let other = dir.path().join("other.pem");
    std::fs::write(&other, rcgen::generate_simple_self_signed([HOST.to_owned()])?.cert.pem())?;
    agent.config_mut().flags_ca = Some(other);
    agent.start()?;
    until_flags(&agent, "its distrust", |flags| {
        flags["error"].as_str().is_some_and(|error| error.contains("certificate"))
    })?;
    ensure!(flags_of(&agent, "reason_code")? == "flag_no_answer");
    agent.kill();

    agent.config_mut().flags_ca = Some(control.certificate.clone());
    agent.config_mut().extra = "[labels]\ndatacenter = \"dc-1\"\n".to_owned();
    agent.start()?;
    until_flags(&agent, "the first answer", |flags| flags["reason_code"] == "flag_disabled")?;

    let public = std::fs::read_to_string(agent.dir().join("hv-01.pub"))?;
    let public = public.split_whitespace().last().context("a key")?;
    control.post(
        "/v1/nodes",
        &format!(r#"{{"nodes":[{{"name":"hv-01","public_key":"{public}","labels":{{}}}}]}}"#),
    )?;
    for (percentage, value, on_v3) in [(100, true, 1), (0, false, 0), (100, true, 1)] {
        let flag = format!(r#"{{"feature":"dwcp_v3_hde","percentage":{percentage},"enabled":true}}"#);
        control.post("/v1/feature-flags", &flag)?;
        until_flags(&agent, "the new value", |flags| flags["value"] == value)?;
        until("its acknowledgement", PATIENCE, || {
            let flag = control.get("/v1/feature-flags/dwcp_v3_hde")?;
            Ok((flag["acked"] == "1/1" && flag["nodes_on_v3"] == on_v3).then_some(()))
        })?;
    }
    let excluded = r#"{"feature":"dwcp_v3_hde","nodes":["hv-01"]}"#;
    control.post("/v1/feature-flags/exclude", excluded)?;
    until_flags(&agent, "its exclusion", |flags| flags["reason_code"] == "flag_excluded")
}

#[test]
fn what_a_restart_remembers_restricts_only() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let server = Server::start()?;
    server.says(&document(100, 9));
    let mut agent = agent(&dir, &format!("http://{}", server.address))?;
    until_flags(&agent, "v3", |flags| flags["value"] == true)?;
    let kept = agent.state_dir().join("flag.json");
    until("the document on disk", PATIENCE, || Ok(kept.is_file().then_some(())))?;

    agent.kill();
    server.says("");
    agent.start()?;
    ensure!(flags_of(&agent, "reason_code")? == "flag_no_answer");
    // The server has gone back in time, as one that was restored from a backup.
    server.says(&document(100, 8));
    until_metric(&agent, "dwcp_flag_refused_total{reason=\"lower_epoch\"} 1")?;
    ensure!(flags_of(&agent, "value")? == false);
    server.says(&document(100, 10));
    until_flags(&agent, "v3", |flags| flags["value"] == true)
}

#[test]
fn a_server_that_evaluates_the_flag_is_asked_by_ofrep() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let server = Server::start()?;
    server.says(r#"{"flags":[{"key":"dwcp_v3_hde","value":true,"reason":"SPLIT"}]}"#);
    let agent = agent(&dir, &format!("ofrep+http://{}", server.address))?;
    until_flags(&agent, "v3", |flags| flags["reason_code"] == "flag_evaluated_on")?;
    let asked = server.last_request();
    ensure!(asked.starts_with("POST /ofrep/v1/evaluate/flags "), "{asked}");
    ensure!(asked.ends_with(r#"{"context":{"targetingKey":"hv-01"}}"#), "{asked}");
    server.says(r#"{"flags":[{"key":"dwcp_v3_hde","reason":"UNKNOWN"}]}"#);
    until_flags(&agent, "the default, which is v1", |flags| flags["reason_code"] == "flag_evaluated_off")
}

#[test]
fn a_file_that_is_replaced_is_obeyed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (file, fresh) = (dir.path().join("flag.json"), dir.path().join("fresh.json"));
    std::fs::write(&file, document(100, 1))?;
    let agent = agent(&dir, &format!("file:{}", file.display()))?;
    ensure!(flags_of(&agent, "value")? == true);
    for (text, code) in [
        (document(0, 2), "flag_disabled"),
        ("{".to_owned(), "flag_malformed"),
        (document(100, 3), "flag_in_cohort"),
    ] {
        std::fs::write(&fresh, text)?;
        std::fs::rename(&fresh, &file)?;
        until_flags(&agent, code, |flags| flags["reason_code"] == code)?;
    }
    std::fs::remove_file(&file)?;
    until_flags(&agent, "v1", |flags| flags["reason_code"] == "flag_no_answer")
}

/// A running agent with this source.
fn agent(dir: &tempfile::TempDir, source: &str) -> Result<Agent> {
    let config = AgentConfig { flags: source.to_owned(), ..AgentConfig::default() };
    let mut agent = Agent::prepare(dir.path(), "hv-01", config)?;
    agent.start()?;
    Ok(agent)
}

fn document(percentage: u8, counter: u64) -> String {
    format!(
        r#"{{"feature":"dwcp_v3_hde","enabled":true,"percentage":{percentage},"epoch":{{"incarnation":1,"counter":{counter}}}}}"#
    )
}

fn flags(agent: &Agent) -> Result<Value> {
    agent.ctl(&[&"flags", &"--json"])?.success()?.json()
}

fn flags_of(agent: &Agent, key: &str) -> Result<Value> {
    Ok(flags(agent)?[key].clone())
}

fn until_flags(agent: &Agent, what: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
    let mut last = Value::Null;
    until(what, PATIENCE, || {
        last = flags(agent)?;
        Ok(holds(&last).then_some(()))
    })
    .with_context(|| format!("{last}\n{}", agent.log()))
}

fn until_metric(agent: &Agent, line: &str) -> Result<()> {
    let name = line.rsplit_once(' ').map_or(line, |(name, _)| name);
    let least: f64 = line.rsplit_once(' ').context("a value")?.1.parse()?;
    until(line, PATIENCE, || {
        let metrics = agent.http_get("/metrics")?;
        let value = metrics.lines().find_map(|found| found.strip_prefix(name)?.trim().parse::<f64>().ok());
        Ok(value.filter(|value| *value >= least).map(drop))
    })
}

/// The real `dwcp-control`; killed when dropped.
struct Control {
    child: Child,
    address: String,
    token: String,
    /// Its own, which it is known by.
    certificate: PathBuf,
    tls: Arc<ClientConfig>,
}

impl Control {
    fn start(dir: &Path) -> Result<Self> {
        let program = target_dir()?.join("release/dwcp-control");
        ensure!(
            program.is_file(),
            "dwcp-control is not built: run `cargo xtask test`, which builds all programs"
        );
        let (state, tokens) = (dir.join("control"), dir.join("tokens"));
        let made = Command::new(&program)
            .args(["token", "new", "--name", "test", "--roles", "admin", "--file"])
            .arg(&tokens)
            .output()?;
        let token = String::from_utf8(made.stdout)?.lines().last().context("no token")?.to_owned();
        let signed = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
        let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        std::fs::write(&certificate, signed.cert.pem())?;
        std::fs::write(&key, signed.signing_key.serialize_pem())?;
        let mut roots = RootCertStore::empty();
        roots.add(signed.cert.der().clone())?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let child = Command::new(&program)
            .args(["serve", "--listen", "127.0.0.1:0", "--state"])
            .arg(&state)
            .arg("--admin-token-file")
            .arg(&tokens)
            .arg("--tls-cert")
            .arg(&certificate)
            .arg("--tls-key")
            .arg(&key)
            .stderr(Stdio::null())
            .spawn()?;
        let mut control = Control { child, address: String::new(), token, certificate, tls: Arc::new(tls) };
        control.address = until("dwcp-control's address", PATIENCE, || {
            let Ok(text) = std::fs::read_to_string(state.join("listen.json")) else { return Ok(None) };
            let listen: Value = serde_json::from_str(&text)?;
            Ok(listen["http"].as_str().map(str::to_owned))
        })?;
        Ok(control)
    }

    fn get(&self, path: &str) -> Result<Value> {
        self.ask("GET", path, "")
    }

    fn post(&self, path: &str, body: &str) -> Result<Value> {
        self.ask("POST", path, body)
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Result<Value> {
        let stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let session = ClientConnection::new(Arc::clone(&self.tls), HOST.try_into()?)?;
        let mut stream = StreamOwned::new(session, stream);
        let (token, length) = (&self.token, body.len());
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: control\r\nAuthorization: Bearer {token}\r\nContent-Length: {length}\r\n\
             Connection: close\r\n\r\n{body}"
        )?;
        let answer = std::io::read_to_string(stream)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
        ensure!(head.starts_with("HTTP/1.1 2"), "{method} {path}: {answer}");
        serde_json::from_str(body).with_context(|| answer.clone())
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An HTTP server on a port of its own, which says one thing to everybody, or nothing. Its threads end with the test.
struct Server {
    address: SocketAddr,
    says: Arc<Mutex<String>>,
    heard: Arc<Mutex<String>>,
}

impl Server {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (says, heard) = (Arc::new(Mutex::new(String::new())), Arc::new(Mutex::new(String::new())));
        let shared = (Arc::clone(&says), Arc::clone(&heard));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (says, heard) = (Arc::clone(&shared.0), Arc::clone(&shared.1));
                std::thread::spawn(move || serve(&stream, &says, &heard));
            }
        });
        Ok(Server { address, says, heard })
    }

    /// From now on: this document, or this OFREP answer; silence if it is empty.
    fn says(&self, what: &str) {
        *self.says.lock().expect("a server's thread panicked") = what.to_owned();
    }

    fn last_request(&self) -> String {
        self.heard.lock().expect("a server's thread panicked").clone()
    }
}

/// Answers on one connection until it ends.
fn serve(mut stream: &TcpStream, says: &Mutex<String>, heard: &Mutex<String>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut request, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
            request.push_str(&line);
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        request.push_str(&String::from_utf8_lossy(&body));
        *heard.lock().ok()? = request;
        let said = says.lock().ok()?.clone();
        let body = match said.as_str() {
            // Whoever waits has this connection for himself, and gives it up.
            "" => continue,
            ofrep if ofrep.starts_with("{\"flags\"") => ofrep.to_owned(),
            document => format!("{{\"flag\":{document}}}"),
        };
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ndwcp-cluster-id: c1\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).ok()?;
    }
}
