//! `dwcpctl keygen`: the key pair of a node.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use dwcp_proto::{NodeKey, NodeName};
use dwcp_rpc::v1::Blame;
use zeroize::Zeroizing;

use crate::args::KeygenArgs;
use crate::error::{CtlError, Exit};

/// Makes the pair and says what to do with it.
pub(crate) fn run(args: &KeygenArgs) -> Result<Exit, CtlError> {
    let key = generate(&args.node)?;
    let (secret, public) =
        (args.out.join(format!("{}.key", args.node)), args.out.join(format!("{}.pub", args.node)));
    fs::create_dir_all(&args.out)
        .map_err(|e| CtlError::local(format!("cannot make {}", args.out.display()), &e))?;
    write_new(&secret, 0o600, key.to_text().as_bytes())?;
    if let Err(error) = write_new(&public, 0o644, key.public().to_text().as_bytes()) {
        // Half a pair would bar the next attempt.
        let _ = fs::remove_file(&secret);
        return Err(error);
    }
    println!("{}  keep it on {}, readable by the agent only", secret.display(), args.node);
    println!(
        "{}  put it into the peers folder of every node that {} trades VMs with",
        public.display(),
        args.node
    );
    println!("fingerprint {}", key.public().fingerprint());
    Ok(Exit::Done)
}

fn generate(node: &NodeName) -> Result<NodeKey, CtlError> {
    let mut seed = Zeroizing::new([0u8; 32]);
    getrandom::fill(&mut *seed)
        .map_err(|e| CtlError::new(Exit::Failed, Blame::Local, "local", format!("no randomness: {e}"), ""))?;
    Ok(NodeKey::from_seed(node.clone(), &seed))
}

/// Writes a file that must not exist yet, and follows no symlink to one.
fn write_new(path: &Path, mode: u32, content: &[u8]) -> Result<(), CtlError> {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => CtlError::new(
            Exit::Failed,
            Blame::Operator,
            "exists",
            format!("{} exists and is not replaced", path.display()),
            "a node whose key changes is a stranger to its peers; move the old file away if that is meant",
        ),
        _ => CtlError::local(format!("cannot write {}", path.display()), &error),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use dwcp_proto::PeerKey;

    use super::*;

    #[test]
    fn a_pair_fits_together_and_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let args = KeygenArgs { node: "hv-01".parse().unwrap(), out: dir.path().join("keys") };
        assert_eq!(run(&args).unwrap(), Exit::Done);
        let secret = args.out.join("hv-01.key");
        assert_eq!(fs::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600);
        let key = NodeKey::parse(&fs::read_to_string(&secret).unwrap()).unwrap();
        let public = PeerKey::parse(&fs::read_to_string(args.out.join("hv-01.pub")).unwrap()).unwrap();
        assert_eq!(key.public(), public);

        let before = fs::read(&secret).unwrap();
        assert_eq!(run(&args).unwrap_err().failure.code, "exists");
        assert_eq!(fs::read(&secret).unwrap(), before);
    }

    #[test]
    fn a_lonely_public_half_bars_nothing_but_itself() {
        let dir = tempfile::tempdir().unwrap();
        let args = KeygenArgs { node: "hv-01".parse().unwrap(), out: dir.path().to_owned() };
        fs::write(dir.path().join("hv-01.pub"), "old").unwrap();
        assert_eq!(run(&args).unwrap_err().failure.code, "exists");
        assert!(!dir.path().join("hv-01.key").exists());
    }
}
