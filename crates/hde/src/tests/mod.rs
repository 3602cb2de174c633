mod attacks;
mod layers;
mod properties;
mod references;
mod round_trip;
