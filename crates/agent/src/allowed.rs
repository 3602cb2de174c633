//! Which of the machine's sockets a caller may name.

use std::path::{Path, PathBuf};

use dwcp_migrate::{Blame, Failure};

/// The folders of `[vmm] paths`.
#[derive(Debug, Clone)]
pub(crate) struct Allowed(Vec<PathBuf>);

impl Allowed {
    /// Only paths in these folders; any absolute path where there are none.
    pub(crate) fn new(folders: Vec<PathBuf>) -> Self {
        Allowed(folders)
    }

    /// The path with its symlinks resolved, if it may be used. It need not exist yet, but its folder must.
    pub(crate) fn resolve(&self, path: &Path) -> Result<PathBuf, Failure> {
        let refuse = |what: String, hint: &str| {
            Failure::new("path_not_allowed", Blame::Operator, format!("{}: {what}", path.display()), hint)
        };
        if !path.is_absolute() {
            return Err(refuse("not an absolute path".to_owned(), "the agent has a folder of its own"));
        }
        if self.0.is_empty() {
            return Ok(path.to_owned());
        }
        let real = real(path).map_err(|error| refuse(error.to_string(), "check the path"))?;
        // A folder that does not exist (yet) allows nothing.
        if self
            .0
            .iter()
            .filter_map(|folder| folder.canonicalize().ok())
            .any(|folder| real.starts_with(folder))
        {
            return Ok(real);
        }
        Err(refuse(
            "outside the folders of [vmm] paths".to_owned(),
            "add its folder to [vmm] paths, or move the socket",
        ))
    }
}

/// The path without symlinks and dots; the last part may be missing.
fn real(path: &Path) -> std::io::Result<PathBuf> {
    match (path.canonicalize(), path.parent(), path.file_name()) {
        (Err(error), Some(folder), Some(name)) if error.kind() == std::io::ErrorKind::NotFound => {
            // A symlink whose target is missing could be given one later.
            match path.is_symlink() {
                true => Err(error),
                false => Ok(folder.canonicalize()?.join(name)),
            }
        }
        (result, ..) => result,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_what_lies_in_the_folders_after_symlinks() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for name in ["in", "out"] {
            fs::create_dir(root.join(name)).unwrap();
            fs::write(root.join(name).join("sock"), "").unwrap();
        }
        symlink(root.join("out/sock"), root.join("in/escape")).unwrap();
        symlink(root.join("out/later"), root.join("in/dangling")).unwrap();
        symlink(root.join("in/sock"), root.join("out/welcome")).unwrap();

        let allowed = Allowed::new(vec![root.join("in"), root.join("missing")]);
        let resolve = |path: &str| allowed.resolve(&root.join(path)).ok();
        assert_eq!(resolve("in/sock"), Some(root.join("in/sock")));
        assert_eq!(resolve("in/not-yet"), Some(root.join("in/not-yet")));
        assert_eq!(resolve("out/welcome"), Some(root.join("in/sock")));
        for outside in
            ["out/sock", "in/escape", "in/dangling", "in/../out/sock", "in/../out/new", "inside", "missing/x"]
        {
            assert_eq!(resolve(outside), None, "{outside}");
        }
    }

    #[test]
    fn without_folders_any_absolute_path() {
        let any = Allowed::new(Vec::new());
        assert_eq!(any.resolve(Path::new("/run/x")).unwrap(), Path::new("/run/x"));
        assert!(any.resolve(Path::new("run/x")).is_err());
    }
}
