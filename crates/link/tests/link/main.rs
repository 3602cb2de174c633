//! Connections over real sockets on the loopback interface.

#![allow(clippy::unwrap_used)]

mod common;
mod listener;
mod quic;
mod tls;
