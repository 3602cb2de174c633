//! For tests, benches and fuzz targets: segments made by hand, a sink that is a guest's RAM, and a slow decoder to
//! hold the fast one against.

mod builder;
mod ram;
pub mod reference;

pub use builder::SegmentBuilder;
pub use ram::Ram;
