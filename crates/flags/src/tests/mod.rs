//! Tests of the crate's parts together.

mod document;
mod state;
