//! For tests, benches and fuzz targets: segments made by hand, and a slow decoder to hold the fast one
//! against.

mod builder;
pub mod reference;

pub use builder::SegmentBuilder;
