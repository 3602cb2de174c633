//! `dwcpctl nodes`: the inventory of the control plane.

use std::fmt::Display;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use dwcp_proto::{NodeName, PeerKey};
use dwcp_rpc::v1::Blame;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::error::{CtlError, Exit, one_line};

/// For one request and its answer.
const LIMIT: Duration = Duration::from_secs(30);
/// Bytes of an answer: a page of the inventory has a few hundred for each of its nodes.
const MAX_ANSWER: u64 = 8 << 20;
/// Nodes in one request: its body stays below the server's limit.
const BATCH: usize = 1000;
/// Headers of an answer.
const MAX_HEADERS: usize = 32;

/// Arguments of `nodes`.
#[derive(Debug, Args)]
pub(crate) struct NodesArgs {
    /// The control plane: http://HOST:PORT or https://HOST:PORT; the port may be left out.
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "DWCP_CONTROL",
        default_value = "http://127.0.0.1:7500"
    )]
    control: String,
    /// A file with a token of the role admin or nodes; to list, none is needed.
    #[arg(long, global = true, value_name = "FILE", env = "DWCP_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// The authorities that may vouch for the control plane, PEM.
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/ssl/certs/ca-certificates.crt")]
    ca: PathBuf,
    /// Print JSON: one object a line.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    command: NodesCommand,
}

#[derive(Debug, Subcommand)]
enum NodesCommand {
    /// Show all nodes: state, path, why, applied epoch, when they were heard.
    List,
    /// Enrol nodes by their public keys, or change what is known of them.
    Import {
        /// Files NAME.pub, and folders of them.
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
        /// What holds for all of them, such as datacenter=dc1; without any, labels stay as they are.
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
        labels: Vec<(String, String)>,
    },
    /// Say that nodes are taken out of service: nobody waits for them any more.
    Drain {
        /// The nodes.
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<NodeName>,
        /// They are back.
        #[arg(long)]
        undo: bool,
    },
    /// Forget nodes: what they say does not count any more.
    Remove {
        /// The nodes.
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<NodeName>,
    },
}

/// Does what is asked for.
pub(crate) async fn run(args: &NodesArgs) -> Result<Exit, CtlError> {
    let control = Control::new(args)?;
    match &args.command {
        NodesCommand::List => list(&control, args.json).await,
        NodesCommand::Import { paths, labels } => {
            let labels: Map<String, Value> =
                labels.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
            let nodes = public_keys(paths)?.into_iter().map(|key| {
                let digits: String = key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
                let mut node = json!({"name": key.node(), "public_key": digits});
                if !labels.is_empty() {
                    node["labels"] = json!(labels);
                }
                node
            });
            change(&control, "/v1/nodes", nodes.collect(), args.json).await
        }
        NodesCommand::Drain { nodes, undo } => {
            let path = if *undo { "/v1/nodes/undrain" } else { "/v1/nodes/drain" };
            change(&control, path, nodes.iter().map(|node| json!(node)).collect(), args.json).await
        }
        NodesCommand::Remove { nodes } => {
            let nodes = nodes.iter().map(|node| json!(node)).collect();
            change(&control, "/v1/nodes/remove", nodes, args.json).await
        }
    }
}

async fn list(control: &Control, json: bool) -> Result<Exit, CtlError> {
    if !json {
        println!("{:<24} {:<8} {:<5} {:<24} {:<12} SEEN", "NODE", "STATE", "PATH", "WHY", "EPOCH");
    }
    let mut after = String::new();
    loop {
        let page = control.ask("GET", &format!("/v1/nodes?after={after}"), "").await?;
        for node in page["nodes"].as_array().into_iter().flatten() {
            if json {
                println!("{node}");
                continue;
            }
            let text = |key: &str| one_line(node[key].as_str().unwrap_or("-"));
            let [name, state, path, reason, epoch, seen] =
                ["name", "state", "path", "reason", "epoch", "seen"].map(text);
            println!("{name:<24} {state:<8} {path:<5} {reason:<24} {epoch:<12} {seen}");
        }
        match page["next"].as_str() {
            Some(next) => after = next.to_owned(),
            None => {
                let strangers: Vec<&str> =
                    page["not_enrolled"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                if !strangers.is_empty() {
                    eprintln!("not enrolled, so not counted: {}", one_line(&strangers.join(", ")));
                }
                return Ok(Exit::Done);
            }
        }
    }
}

async fn change(control: &Control, path: &str, nodes: Vec<Value>, json: bool) -> Result<Exit, CtlError> {
    for batch in nodes.chunks(BATCH) {
        let done = control.ask("POST", path, &json!({"nodes": batch}).to_string()).await?;
        if json {
            println!("{done}");
        } else {
            let changed = if done["changed"] == true { "done" } else { "they were so already" };
            println!("{} nodes: {changed}", batch.len());
        }
    }
    Ok(Exit::Done)
}

/// The way to the control plane.
struct Control {
    host: String,
    port: u16,
    tls: Option<TlsConnector>,
    token: Option<String>,
}

impl Control {
    fn new(args: &NodesArgs) -> Result<Self, CtlError> {
        let form = || wrong(format!("--control {}: expected http://HOST:PORT or https://HOST", args.control));
        let (scheme, rest) = args.control.split_once("://").ok_or_else(form)?;
        let (tls, port) = match scheme {
            "http" => (None, 80),
            "https" => (Some(tls(&args.ca)?), 443),
            _ => return Err(form()),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        // An IPv6 address stands in brackets, which are no part of it.
        let (host, port) = match rest.rsplit_once(':').filter(|(_, port)| !port.ends_with(']')) {
            Some((host, port)) => (host, port.parse().map_err(|_| form())?),
            None => (rest, port),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || host.chars().any(|c| c.is_control() || matches!(c, '/' | ' ')) {
            return Err(form());
        }
        let token = args.token_file.as_deref().map(token).transpose()?;
        Ok(Control { host: host.to_owned(), port, tls, token })
    }

    /// One request; a refusal is an error.
    async fn ask(&self, method: &str, path: &str, body: &str) -> Result<Value, CtlError> {
        let exchange = tokio::time::timeout(LIMIT, self.exchange(method, path, body)).await;
        let (status, text) = match exchange {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(self.unreachable(error)),
            Err(_) => return Err(self.unreachable("no answer in time")),
        };
        let answer: Value = serde_json::from_slice(&text).unwrap_or_default();
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        let said = |key: &str| answer["error"][key].as_str().map(str::to_owned);
        let message = said("message").unwrap_or_else(|| format!("status {status}"));
        let exit = if (400..500).contains(&status) { Exit::BadRequest } else { Exit::Failed };
        let code = said("code").unwrap_or_else(|| "control".to_owned());
        let hint = match (status, &self.token) {
            (401, None) => "name a file with a token: --token-file or DWCP_TOKEN_FILE".to_owned(),
            _ => said("hint").unwrap_or_default(),
        };
        Err(CtlError::new(exit, Blame::Operator, &code, message, hint))
    }

    async fn exchange(&self, method: &str, path: &str, body: &str) -> io::Result<(u16, Vec<u8>)> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        let Some(tls) = &self.tls else { return self.over(stream, method, path, body).await };
        let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other)?;
        self.over(tls.connect(name, stream).await?, method, path, body).await
    }

    async fn over(
        &self,
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        method: &str,
        path: &str,
        body: &str,
    ) -> io::Result<(u16, Vec<u8>)> {
        let token = self.token.as_ref().map(|token| format!("authorization: Bearer {token}\r\n"));
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-length: {}\r\n{}\r\n{body}",
            self.host,
            body.len(),
            token.unwrap_or_default()
        );
        stream.write_all(request.as_bytes()).await?;
        stream.flush().await?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer).await?;
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        match response.parse(&answer).map_err(io::Error::other)? {
            httparse::Status::Complete(head) => Ok((response.code.unwrap_or(0), answer.split_off(head))),
            httparse::Status::Partial => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn unreachable(&self, why: impl Display) -> CtlError {
        let message = format!("no answer from the control plane at {}:{}: {why}", self.host, self.port);
        let hint = "check that dwcp-control runs there and that --control or DWCP_CONTROL names it";
        CtlError::new(Exit::Unreachable, Blame::Local, "control_unreachable", message, hint)
    }
}

fn tls(ca: &Path) -> Result<TlsConnector, CtlError> {
    let fail = |what: String| wrong(format!("--ca {}: {what}", ca.display()));
    let certificates = CertificateDer::pem_file_iter(ca)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(|error| fail(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    // A system's collection may hold one that is too odd for us; the others still count.
    if roots.add_parsable_certificates(certificates).0 == 0 {
        return Err(fail("it holds no certificate".to_owned()));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| fail(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// The last line of a file, so that what `dwcp-control token new` printed may stand in it as it was.
fn token(file: &Path) -> Result<String, CtlError> {
    let text =
        fs::read_to_string(file).map_err(|e| CtlError::local(format!("read {}", file.display()), &e))?;
    let token = text.lines().last().unwrap_or_default().trim();
    match !token.is_empty() && token.chars().all(|c| c.is_ascii_graphic()) {
        true => Ok(token.to_owned()),
        false => Err(wrong(format!("{} holds no token", file.display()))),
    }
}

/// The keys in these files and in the `.pub` files of these folders.
fn public_keys(paths: &[PathBuf]) -> Result<Vec<PeerKey>, CtlError> {
    let mut files = Vec::new();
    for path in paths {
        let unreadable = |e: io::Error| CtlError::local(format!("read {}", path.display()), &e);
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        for entry in fs::read_dir(path).map_err(unreadable)? {
            let file = entry.map_err(unreadable)?.path();
            if file.extension().is_some_and(|extension| extension == "pub") {
                files.push(file);
            }
        }
    }
    files.sort();
    let read = |file: &PathBuf| {
        let text =
            fs::read_to_string(file).map_err(|e| CtlError::local(format!("read {}", file.display()), &e))?;
        PeerKey::parse(&text).map_err(|error| wrong(format!("{}: {error}", file.display())))
    };
    files.iter().map(read).collect()
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE, such as datacenter=dc1")?;
    for part in [key, value] {
        NodeName::new(part).map_err(|_| "key and value are 1 to 64 of A-Z a-z 0-9 . _ -".to_owned())?;
    }
    Ok((key.to_owned(), value.to_owned()))
}

fn wrong(message: String) -> CtlError {
    CtlError::new(Exit::BadRequest, Blame::Operator, "bad_request", message, "")
}
