//! Tests of the crate's parts together.

mod document;
mod poll;
mod state;
