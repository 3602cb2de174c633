//! The hypervisor's side of a migration: driving a VMM, and taking its migration stream apart and putting it together.
//!
//! ```text
//!            source node                                          destination node
//!  +--------------------------------+                   +---------------------------------+
//!  | VMM -- QMP --> qmp::Qemu       |                   |      qmp::Qemu <-- QMP -- VMM   |
//!  |  |             preflight       |  VmDescription    |      preflight             ^    |
//!  |  |             describe -------+-------------------+----> compare               |    |
//!  |  v                             |                   |                            |    |
//!  | socket::open_outgoing          |                   |      socket::open_incoming '    |
//!  |  |                             |                   |         ^                       |
//!  |  '-> stream::Cutter -> Segment-+--- other crates --+-> bytes-'                       |
//!  +--------------------------------+                   +---------------------------------+
//! ```
//!
//! In the order of a migration:
//! 1. [`qmp::Qemu::connect`] at both ends; [`qmp::Qemu::events`] before anything that causes one.
//! 2. [`preflight::source`], [`preflight::destination`], and [`preflight::compare`] over both sides'
//!    [`describe::VmDescription`]s.
//! 3. The destination stops its VMM and opens a connection into it ([`socket::open_incoming`]).
//! 4. The source opens one out of its VMM ([`socket::open_outgoing`]), which thereby begins to migrate; or several
//!    ([`socket::open_channels`]), which [`multifd::Merger`] makes one stream of.
//!    Or it reads the VMM's RAM itself ([`direct`]), which makes the same stream.
//! 5. [`stream::Cutter`] makes [`Segment`](dwcp_proto::Segment)s of what the source VMM writes; their bytes, in order,
//!    are what the destination VMM reads.
//!
//! [`sim`] has a guest and a VMM that need no hypervisor. Nothing here knows of agents, chunks or networks.

pub mod describe;
pub mod direct;
pub mod kept;
pub mod mapped;
pub mod multifd;
pub mod preflight;
pub mod qmp;
pub mod sim;
pub mod socket;
pub mod stream;
