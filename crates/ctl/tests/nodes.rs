//! `dwcpctl nodes` against a real `dwcp-control`.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ctl(url: &str, token: Option<&Path>, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dwcpctl"));
    command.args(["nodes", "--control", url]).args(arguments);
    command.env_remove("DWCP_TOKEN_FILE").env_remove("DWCP_CONTROL");
    if let Some(token) = token {
        command.arg("--token-file").arg(token);
    }
    command.output().unwrap()
}

#[test]
fn the_inventory_is_kept_from_the_command_line() {
    let control = Path::new(env!("CARGO_BIN_EXE_dwcpctl")).with_file_name("dwcp-control");
    if !control.exists() {
        assert!(std::env::var_os("CI").is_none(), "build dwcp-control first");
        println!("SKIPPED the_inventory_is_kept_from_the_command_line: no {} here", control.display());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let new = ["token", "new", "--name", "ops", "--roles", "nodes", "--file"];
    let made = Command::new(&control).args(new).arg(path("tokens")).output().unwrap();
    // As it was printed.
    std::fs::write(path("token"), made.stdout).unwrap();
    let mut process = Command::new(&control)
        .args(["serve", "--listen", "127.0.0.1:0"])
        .arg("--state")
        .arg(path("state"))
        .arg("--admin-token-file")
        .arg(path("tokens"))
        .env_remove("RUST_LOG")
        .env_remove("DWCP_LOG_FORMAT")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
    let _server = Server(process);
    let ready =
        lines.find_map(|line| Some(line.split_once("ready address=")?.1.split(' ').next()?.to_owned()));
    let url = format!("http://{}", ready.expect("the server starts"));
    std::thread::spawn(move || lines.for_each(drop));

    for node in ["hv-01", "hv-02"] {
        let mut keygen = Command::new(env!("CARGO_BIN_EXE_dwcpctl"));
        let made = keygen.args(["keygen", "--node", node, "--out"]).arg(path("keys")).output().unwrap();
        assert!(made.status.success());
    }
    let keys = path("keys");
    let import = ["import", keys.to_str().unwrap(), "--label", "datacenter=dc1"];
    let refused = ctl(&url, None, &import);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && said.contains("--token-file"), "{said}");

    let token = path("token");
    let run = |arguments: &[&str]| {
        let output = ctl(&url, Some(&token), arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(run(&import).contains("2 nodes: done"));
    assert!(run(&import).contains("they were so already"));
    run(&["drain", "hv-02"]);
    let list = run(&["list", "--json"]);
    let nodes: Vec<serde_json::Value> =
        list.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let shown: Vec<_> = nodes.iter().map(|node| (node["name"].as_str(), node["state"].as_str())).collect();
    assert_eq!(shown, [(Some("hv-01"), Some("absent")), (Some("hv-02"), Some("drained"))]);
    assert_eq!(nodes[0]["labels"]["datacenter"], "dc1");
    run(&["drain", "hv-02", "--undo"]);
    run(&["remove", "hv-01"]);
    let list = run(&["list"]);
    assert!(list.contains("hv-02") && list.contains("absent") && !list.contains("hv-01"), "{list}");
    assert_eq!(ctl(&url, Some(&token), &["remove", "hv-09"]).status.code(), Some(2));
    assert_eq!(ctl("http://127.0.0.1:1", None, &["list"]).status.code(), Some(3));
    assert_eq!(ctl("127.0.0.1:1", None, &["list"]).status.code(), Some(2));
}
