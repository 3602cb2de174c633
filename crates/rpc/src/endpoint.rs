//! Where the agent's RPC socket is: `unix:PATH`, the same text in the configuration and on the command line.

use std::path::{Path, PathBuf};

/// The agent's socket where nobody says otherwise.
pub const DEFAULT: &str = "unix:/run/dwcp/agent.sock";

/// Bytes of a unix socket's path: `sun_path` of Linux, less its closing zero.
pub const MAX_PATH: usize = 107;

/// A text that names no socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadEndpoint(String);

impl std::fmt::Display for BadEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "expected unix: and an absolute path of at most {MAX_PATH} bytes, found {:?}", self.0)
    }
}

impl std::error::Error for BadEndpoint {}

/// The path in `unix:PATH`.
pub fn parse(text: &str) -> Result<PathBuf, BadEndpoint> {
    text.strip_prefix("unix:")
        .filter(|path| path.len() <= MAX_PATH && Path::new(path).is_absolute() && !path.contains('\0'))
        .map(PathBuf::from)
        .ok_or_else(|| BadEndpoint(text.chars().take(2 * MAX_PATH).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_paths_that_fit_a_socket() {
        assert_eq!(parse(DEFAULT), Ok(PathBuf::from("/run/dwcp/agent.sock")));
        for bad in
            ["/run/x.sock", "unix:x.sock", "unix:", "tcp:1.2.3.4:5", &format!("unix:/{}", "x".repeat(107))]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
