//! Writes an initramfs: the "newc" cpio format of the kernel's Documentation/driver-api/early-userspace/buffer-format.

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";

/// What an entry is.
pub(crate) enum Entry<'a> {
    /// A folder.
    Folder,
    /// A file that may be executed.
    Program(&'a [u8]),
    /// Any other file.
    File(&'a [u8]),
    /// A symbolic link, and where it leads.
    Link(&'a str),
    /// A character device: major, minor.
    Device(u32, u32),
}

/// The archive of these entries; folders come before what is in them.
pub(crate) fn archive(entries: &[(&str, Entry<'_>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (inode, (name, entry)) in entries.iter().enumerate() {
        let (mode, data, device): (u32, &[u8], _) = match *entry {
            Entry::Folder => (0o040_755, &[], (0, 0)),
            Entry::Program(data) => (0o100_755, data, (0, 0)),
            Entry::File(data) => (0o100_644, data, (0, 0)),
            Entry::Link(to) => (0o120_777, to.as_bytes(), (0, 0)),
            Entry::Device(major, minor) => (0o020_600, &[], (major, minor)),
        };
        append(&mut out, inode as u32 + 1, mode, name, data, device);
    }
    append(&mut out, 0, 0, TRAILER, &[], (0, 0));
    out
}

fn append(out: &mut Vec<u8>, inode: u32, mode: u32, name: &str, data: &[u8], device: (u32, u32)) {
    let (links, name_size) = (1, name.len() as u32 + 1);
    // Inode, mode, uid, gid, links, mtime, size, device of the file system (2), device itself (2), name size, check.
    let fields = [inode, mode, 0, 0, links, 0, data.len() as u32, 0, 0, device.0, device.1, name_size, 0];
    out.extend_from_slice(MAGIC.as_bytes());
    for field in fields {
        out.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(data);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_names_and_data_are_aligned() {
        let bytes = archive(&[("dev", Entry::Folder), ("init", Entry::Program(b"hello"))]);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.find("070701"), Some(0));
        assert_eq!(text.find("hello").map(|at| at % 4), Some(0));
        assert_eq!(text.find("TRAILER!!!").map(|at| (at - 110) % 4), Some(0));
        assert_eq!(bytes.len() % 4, 0);
    }
}
