//! The gRPC contract of the agent: package `dwcp.agent.v1`, service `Migrations`.
//!
//! - [`v1`]: messages, client and server, generated from `proto/dwcp/agent/v1/migrations.proto`. The output is
//!   committed, so that a build needs no generator; `tests/generated.rs` holds it against the `.proto` file and
//!   writes it anew with `UPDATE=1 cargo test -p dwcp-rpc`.
//! - [`DESCRIPTORS`]: the file descriptor set, for gRPC reflection.
//! - [`failure`]: how a failure travels in a failed call.
//! - [`endpoint`]: where the socket is.
//!
//! ```text
//! dwcpctl, orchestrator --MigrationsClient--> unix socket --MigrationsServer--> dwcpd
//! ```

pub mod endpoint;
pub mod failure;

/// Messages, client and server of `dwcp.agent.v1`. What each means stands in the `.proto` file and is repeated here.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used, rustdoc::all)]
pub mod v1 {
    include!("gen/dwcp.agent.v1.rs");
}

/// The encoded `FileDescriptorSet` of [`v1`], comments included.
pub const DESCRIPTORS: &[u8] = include_bytes!("gen/dwcp.agent.v1.bin");

/// Bytes of one message, either way. A status takes about 1 KiB, so a list holds some thousand migrations.
pub const MAX_MESSAGE: usize = 1 << 20;
