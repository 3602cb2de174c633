//! The followers under a simulated clock, against servers within the process that do what each test tells them.

mod api;
mod file;
mod keeper;
mod ofrep;
mod scripted;
