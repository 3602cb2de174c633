mod attacks;
mod lanes;
mod layers;
mod properties;
mod references;
mod round_trip;
