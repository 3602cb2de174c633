//! Holds the committed code in `src/gen` against the `.proto` file. `UPDATE=1 cargo test -p dwcp-rpc` writes it anew.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use prost::Message;

const FILES: [&str; 2] = ["dwcp.agent.v1.rs", "dwcp.agent.v1.bin"];

#[test]
fn generated_code_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fresh = tempfile::tempdir().unwrap();
    generate(&root.join("proto"), fresh.path());

    let committed = root.join("src/gen");
    for name in FILES {
        let new = fs::read(fresh.path().join(name)).unwrap();
        if std::env::var_os("UPDATE").is_some() {
            fs::write(committed.join(name), &new).unwrap();
        } else if fs::read(committed.join(name)).ok().as_ref() != Some(&new) {
            panic!("src/gen/{name} is not what the .proto file says; run UPDATE=1 cargo test -p dwcp-rpc");
        }
    }
}

fn generate(protos: &Path, out: &Path) {
    let set = protox::compile(["dwcp/agent/v1/migrations.proto"], [protos]).unwrap();
    // protox keeps the comments, which reflection hands on and the generator turns into rustdoc.
    fs::write(out.join(FILES[1]), set.encode_to_vec()).unwrap();
    tonic_prost_build::configure().out_dir(out).compile_fds(set).unwrap();
}
