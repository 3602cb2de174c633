//! Asking the server: over a socket, and with the commands of the plans.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// For one answer, on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct Answer {
    pub(crate) status: u16,
    body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// One request on a connection of its own. An answer that breaks off is an error.
pub(crate) fn ask(
    server: SocketAddr,
    method: &str,
    path: &str,
    token: Option<&str>,
    body: &str,
) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let token = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    let length = body.len();
    // The type that curl -d names.
    let fixed = "content-type: application/x-www-form-urlencoded\r\nconnection: close\r\n";
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: x\r\n{fixed}content-length: {length}\r\n{token}\r\n{body}"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let broken = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(broken)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(broken)?;
    let promised = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
    match promised {
        Some(length) if length != body.len() => Err(broken()),
        _ => Ok(Answer { status, body: body.to_owned() }),
    }
}

/// The commands, letter by letter.
pub(crate) mod plans {
    use std::net::SocketAddr;
    use std::process::Command;

    use crate::process::Setup;

    pub(crate) const TEN: &str = r#"curl -X POST https://api.novacron.io/v1/feature-flags \
  -H "Authorization: Bearer $ADMIN_TOKEN" \
  -d '{
    "feature": "dwcp_v3_hde",
    "percentage": 10,
    "enabled": true
  }'"#;
    pub(crate) const FIFTY: &str = r#"curl -X POST https://api.novacron.io/v1/feature-flags \
  -H "Authorization: Bearer $ADMIN_TOKEN" \
  -d '{
    "feature": "dwcp_v3_hde",
    "percentage": 50,
    "enabled": true
  }'"#;
    pub(crate) const HUNDRED: &str = r#"curl -X POST https://api.novacron.io/v1/feature-flags \
  -H "Authorization: Bearer $ADMIN_TOKEN" \
  -d '{
    "feature": "dwcp_v3_hde",
    "percentage": 100,
    "enabled": true
  }'"#;
    pub(crate) const ROLLBACK: &str = r#"curl -X POST https://api.novacron.io/v1/feature-flags \
  -H "Authorization: Bearer $ADMIN_TOKEN" \
  -d '{
    "feature": "dwcp_v3_hde",
    "percentage": 0,
    "enabled": false
  }'"#;
    pub(crate) const PARTIAL: &str = r#"curl -X POST https://api.novacron.io/v1/feature-flags \
  -H "Authorization: Bearer $ADMIN_TOKEN" \
  -d '{
    "feature": "dwcp_v3_hde",
    "percentage": 10,  # or 0
    "enabled": true
  }'"#;
    pub(crate) const EXCLUDE: &str = r#"curl -X POST https://api.novacron.io/v1/feature-flags/exclude \
  -H "Authorization: Bearer $ADMIN_TOKEN" \
  -d '{
    "feature": "dwcp_v3_hde",
    "nodes": ["node-123", "node-456"]
  }'"#;
    pub(crate) const VERIFY: &str = "curl https://api.novacron.io/v1/feature-flags/dwcp_v3_hde";
    pub(crate) const STATUS: &str = "curl https://api.novacron.io/v1/health/detailed";
    pub(crate) const HEALTH: &str = "curl https://api.novacron.io/health";
    pub(crate) const CANARY: &str = r#"curl -H "X-Canary-Debug: 1" https://api.novacron.io/health"#;

    /// Runs a command as a shell does, with the name leading to our server; whether it worked, and what it said.
    pub(crate) fn run(command: &str, host: &str, server: SocketAddr, setup: &Setup) -> (bool, String) {
        // Without --fail-with-body curl is content with any answer.
        let curl = format!(
            "curl() {{ command curl --silent --show-error --fail-with-body --max-time 30 --noproxy '*' \
             --connect-to {host}:443:{server} --cacert {} \"$@\"; }}\n{command}",
            setup.path("cert.pem").display()
        );
        let output =
            Command::new("sh").args(["-c", &curl]).env("ADMIN_TOKEN", &setup.token).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    }
}
