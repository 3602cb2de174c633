//! Makes TUN devices: <https://docs.kernel.org/networking/tuntap.html>.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::ioctl::{Setter, ioctl, opcode};

const DEVICE: &str = "/dev/net/tun";
/// `TUNSETIFF`: `_IOW('T', 202, int)`, though it takes the request below.
const SET_INTERFACE: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 202);
/// Packets are IP packets, and nothing stands before them.
const TUN_WITHOUT_HEADER: u16 = 0x0001 | 0x1000;

/// The kernel's `struct ifreq` as far as this ioctl reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Makes the device `name` in this process's network namespace. It lives as long as the file.
pub(crate) fn create(name: &str) -> Result<File> {
    let path = Path::new(DEVICE);
    let file = File::options().read(true).write(true).open(path).with_context(|| format!("open {DEVICE}"))?;
    let mut request = Request { name: [0; 16], flags: TUN_WITHOUT_HEADER, rest: [0; 22] };
    ensure!(name.len() < request.name.len(), "{name} is too long for a device");
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads a `struct ifreq` of 40 bytes, of which `Request` has the layout, and keeps no pointer to it.
    #[allow(unsafe_code)]
    let made = unsafe { ioctl(&file, Setter::<SET_INTERFACE, Request>::new(request)) };
    made.with_context(|| format!("make the network device {name}"))?;
    Ok(file)
}
