//! Debian's packages, fetched and unpacked with the machine's own apt and mirror but without touching its state: lists,
//! cache and "installed packages" (none) are private, so the result is the same on every machine, and root is not needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::run::{bounded, installed, output};

/// For the lists of a few suites (10 MB).
const UPDATE: Duration = Duration::from_secs(180);
/// For some 50 MB of packages.
const DOWNLOAD: Duration = Duration::from_secs(600);
/// For one package.
const UNPACK: Duration = Duration::from_secs(60);

/// The release whose packages are used.
pub(crate) const RELEASE: &str = "bookworm";
/// The suite with newer versions for that release, on the same mirror.
pub(crate) const BACKPORTS: &str = "bookworm-backports";
/// The C library and its loader must fit each other, so the machine's own is used by what runs here.
const NEVER_UNPACKED: &str = "libc6_";

/// A private apt in a folder of its own.
pub(crate) struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Makes the folder and fetches the lists of packages.
    ///
    /// # Errors
    /// No apt here, no source of Debian 12 in the machine's settings, or no mirror in reach.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        ensure!(
            std::env::consts::ARCH == "x86_64",
            "the laboratory's machines are x86-64, and so must this one be"
        );
        ensure!(
            installed("apt-get") && installed("dpkg-deb"),
            "the laboratory comes from Debian's packages: apt-get and dpkg-deb are needed, on Debian 12 or a relative"
        );
        for part in ["lists/partial", "archives/partial", "empty"] {
            fs::create_dir_all(folder.join(part))?;
        }
        fs::write(folder.join("status"), "")?;
        fs::write(folder.join("sources.list"), sources()?)?;
        fs::write(folder.join("apt.conf"), configuration(folder))?;
        let apt = Apt { folder: folder.to_owned() };
        let said = output(apt.get(UPDATE).args(["-q", "update"]))?;
        // A mirror out of reach is a mere warning to apt; the reason is on the line after it.
        if let Some(at) = said.find("Err:") {
            let why: Vec<&str> = said[at..].lines().take(2).map(str::trim).collect();
            bail!(
                "the lists of Debian's packages cannot be fetched; is the network down? {}",
                why.join(": ")
            );
        }
        Ok(apt)
    }

    /// Fetches `package` of `suite` with all that it depends on, and unpacks everything but the C library into `into`.
    ///
    /// # Errors
    /// No such package, the mirror is out of reach, the disk is full.
    pub(crate) fn unpack_with_dependencies(&self, suite: &str, package: &str, into: &Path) -> Result<()> {
        let archives = self.folder.join(format!("archives/{suite}-{package}"));
        fs::create_dir_all(archives.join("partial"))?;
        let to = format!("Dir::Cache::archives={}", archives.display());
        output(self.get(DOWNLOAD).args([
            "-q",
            "-y",
            "-t",
            suite,
            "-o",
            &to,
            "--download-only",
            "install",
            package,
        ]))?;
        unpack_all(&archives, into, Some(NEVER_UNPACKED))
    }

    /// Fetches `package` alone and unpacks it into `into`.
    ///
    /// # Errors
    /// As [`Apt::unpack_with_dependencies`].
    pub(crate) fn unpack_alone(&self, package: &str, into: &Path) -> Result<()> {
        let archives = self.folder.join(format!("archives/{package}"));
        fs::create_dir_all(&archives)?;
        output(self.get(DOWNLOAD).current_dir(&archives).args(["-q", "download", package]))?;
        unpack_all(&archives, into, None)
    }

    /// The package that an empty package such as `linux-image-cloud-amd64` stands for: its only dependency.
    ///
    /// # Errors
    /// No such package.
    pub(crate) fn stands_for(&self, package: &str) -> Result<String> {
        let mut cache = bounded(UNPACK, "apt-cache");
        let depends = output(self.configured(&mut cache).args(["depends", package]))?;
        let first = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(first.with_context(|| format!("{package} depends on nothing"))?.to_owned())
    }

    fn get(&self, limit: Duration) -> Command {
        let mut command = bounded(limit, "apt-get");
        self.configured(&mut command);
        command
    }

    fn configured<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        // `-c` is read after the machine's own settings (proxies and the like), so it can undo some of them.
        command.arg("-c").arg(self.folder.join("apt.conf")).env("LC_ALL", "C")
    }
}

fn unpack_all(archives: &Path, into: &Path, but: Option<&str>) -> Result<()> {
    fs::create_dir_all(into)?;
    for entry in fs::read_dir(archives)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".deb") && !but.is_some_and(|but| name.starts_with(but)) {
            output(bounded(UNPACK, "dpkg-deb").arg("-x").arg(&path).arg(into))?;
        }
    }
    Ok(())
}

fn configuration(folder: &Path) -> String {
    let at = |part: &str| folder.join(part).display().to_string();
    let settings = [
        ("Dir::State", at("")),
        ("Dir::State::lists", at("lists")),
        ("Dir::State::status", at("status")),
        ("Dir::Cache", at("")),
        ("Dir::Cache::archives", at("archives")),
        ("Dir::Etc::sourcelist", at("sources.list")),
        ("Dir::Etc::sourceparts", at("empty")),
        ("Dir::Etc::preferences", at("empty/none")),
        ("Dir::Etc::preferencesparts", at("empty")),
        ("Dir::Log", at("")),
        // The folder belongs to whoever runs this, and apt's own user may not reach it.
        ("APT::Sandbox::User", String::new()),
        ("APT::Install-Recommends", "false".into()),
        ("Acquire::Languages", "none".into()),
        ("Acquire::Retries", "3".into()),
        ("Acquire::http::Timeout", "20".into()),
        ("Acquire::https::Timeout", "20".into()),
        ("Debug::NoLocking", "true".into()),
    ];
    // The machine's hooks would work on the machine's state; its further lists are of no use here.
    let cleared = [
        "APT::Update::Post-Invoke",
        "APT::Update::Post-Invoke-Success",
        "DPkg::Post-Invoke",
        "DPkg::Pre-Install-Pkgs",
        "APT::Default-Release",
        "Acquire::IndexTargets::deb::DEP-11",
        "Acquire::IndexTargets::deb::DEP-11-icons",
        "Acquire::IndexTargets::deb::DEP-11-icons-small",
        "Acquire::IndexTargets::deb::DEP-11-icons-hidpi",
        "Acquire::IndexTargets::deb::DEP-11-icons-large",
        "Acquire::IndexTargets::deb::DEP-11-icons-large-hidpi",
    ];
    let clear = cleared.map(|name| format!("#clear {name};\n")).concat();
    settings.iter().fold(clear, |text, (name, value)| text + &format!("{name} \"{value}\";\n"))
}

/// One archive in the machine's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    uri: String,
    suite: String,
    signed_by: Option<String>,
}

/// A `sources.list`: what the machine has of the release, and its backports from the same mirror.
fn sources() -> Result<String> {
    let mut found = Vec::new();
    let parts =
        fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path());
    for path in parts.chain(["/etc/apt/sources.list".into()]) {
        let text = fs::read_to_string(&path).unwrap_or_default();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => found.extend(one_line(&text)),
            Some("sources") => found.extend(deb822(&text)),
            _ => {}
        }
    }
    with_backports(&found)
}

fn with_backports(found: &[Source]) -> Result<String> {
    let ours = |source: &&Source| {
        source.suite.strip_prefix(RELEASE).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    let Some(main) = found.iter().find(|source| source.suite == RELEASE) else {
        bail!(
            "/etc/apt names no mirror of Debian 12 ({RELEASE}): its packages are what the laboratory is made of"
        );
    };
    let backports = Source { suite: BACKPORTS.into(), ..main.clone() };
    let mut lines: Vec<String> = found.iter().filter(ours).chain([&backports]).map(Source::line).collect();
    lines.sort();
    lines.dedup();
    Ok(lines.concat())
}

impl Source {
    fn line(&self) -> String {
        let options = self.signed_by.as_ref().map(|key| format!("[signed-by={key}] ")).unwrap_or_default();
        format!("deb {options}{} {} main\n", self.uri, self.suite)
    }
}

/// Reads the one-line format: `deb [option=value] URI suite component...`.
fn one_line(text: &str) -> Vec<Source> {
    let entry = |line: &str| {
        let rest = line.trim().strip_prefix("deb ")?.trim();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?.to_owned(), words.next()?.to_owned());
        let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        Some(Source { uri, suite, signed_by: signed_by.map(str::to_owned) })
    };
    text.lines().filter_map(entry).collect()
}

/// Reads the deb822 format: paragraphs of `Field: values`.
fn deb822(text: &str) -> Vec<Source> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).map(str::trim_end).collect();
    lines.split(|line| line.is_empty()).flat_map(paragraph).collect()
}

fn paragraph(lines: &[&str]) -> Vec<Source> {
    let field = |name: &str| {
        let find = |line: &&str| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        };
        lines.iter().find_map(find).unwrap_or_default()
    };
    let words = |name: &str| field(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    if !words("Types").contains(&"deb".to_owned()) || field("Enabled").eq_ignore_ascii_case("no") {
        return Vec::new();
    }
    // A key may also stand in the file itself; such a mirror is taken with the keys that the machine trusts anyway.
    let signed_by = Some(field("Signed-By")).filter(|key| key.starts_with('/'));
    let suites = words("Suites");
    let with = |uri: &String| {
        let uri = uri.clone();
        let signed_by = signed_by.clone();
        suites
            .iter()
            .map(move |suite| Source { uri: uri.clone(), suite: suite.clone(), signed_by: signed_by.clone() })
            .collect::<Vec<_>>()
    };
    words("URIs").iter().flat_map(with).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suite: &str, signed_by: Option<&str>) -> Source {
        Source { uri: uri.into(), suite: suite.into(), signed_by: signed_by.map(Into::into) }
    }

    #[test]
    fn both_formats_of_sources_are_read() {
        let lines = "# deb http://no.example x main\ndeb-src http://a.example bookworm main\n\
                     deb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main contrib\n\
                     deb http://b.example/s bookworm-security main";
        let expected = [
            source("http://a.example/debian", "bookworm", Some("/k.gpg")),
            source("http://b.example/s", "bookworm-security", None),
        ];
        assert_eq!(one_line(lines), expected);

        let paragraphs = "Types: deb deb-src\n# a comment\nURIs: http://a.example/debian\nSuites: bookworm bookworm-updates\n\
                          Components: main\nSigned-By: /k.gpg\n\nTypes: deb\nEnabled: no\nURIs: http://c.example\nSuites: x\n";
        let expected = [
            source("http://a.example/debian", "bookworm", Some("/k.gpg")),
            source("http://a.example/debian", "bookworm-updates", Some("/k.gpg")),
        ];
        assert_eq!(deb822(paragraphs), expected);
    }

    #[test]
    fn backports_come_from_the_same_mirror_and_others_are_left_out() {
        let found = [
            source("http://a.example/debian", "bookworm", Some("/k.gpg")),
            source("http://b.example/s", "bookworm-security", None),
            source("http://c.example", "nodistro", None),
        ];
        let expected = "deb [signed-by=/k.gpg] http://a.example/debian bookworm main\n\
                        deb [signed-by=/k.gpg] http://a.example/debian bookworm-backports main\n\
                        deb http://b.example/s bookworm-security main\n";
        assert_eq!(with_backports(&found).unwrap(), expected);
        assert!(with_backports(&found[1..]).is_err());
    }
}
