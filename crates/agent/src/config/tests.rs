use super::*;

const FULL: &str = r#"
node = "hv-01"
state_dir = "/var/lib/dwcp"

[listen]
data = "192.0.2.1:7400"
rpc = "unix:/run/dwcp/agent.sock"
metrics = "[::1]:0"

[identity]
key = "/etc/dwcp/hv-01.key"
peers = "/etc/dwcp/peers"

[flags]
source = "file:/etc/dwcp/flag.json"
without = "v3"
ca = "/etc/dwcp/ca.pem"
server_key = "/etc/dwcp/control.pub"
token_file = "/etc/dwcp/token"
return_after = "90s"

[policy]
v1_plain = true
v1 = "datacenter"
datacenter_encryption = "none"

[limits]
migrations = 2
cpus = 4
workers = 3
memory = "64MiB"
agent_memory = "512MiB"
cpu_pressure = 80
bandwidth = "200Mbit"
node_bandwidth = "800Mbit"

[link]
datacenter_rtt = "2ms"
datacenter_rate = "10Gbit"
congestion = "system"
transport = "quic"

[vmm]
attach = "none"
outlive = true
paths = ["/run/qemu", "/run/libvirt"]
sockets = "/run/dwcp-vmm"

[labels]
datacenter = "dc-1"

[log]
format = "json"
level = "info,dwcp_link=debug"

[hde]
unchanged = true
dedup = true
lanes = true
delta = false
mapped = true
"#;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(Path::new("/etc/dwcp/dwcpd.toml"), text).map_err(|e| e.to_string())
}

/// The error of `FULL` with `from` replaced.
fn error(from: &str, to: &str) -> String {
    assert!(FULL.contains(from), "{from}");
    parse(&FULL.replacen(from, to, 1)).expect_err(to)
}

#[test]
fn every_key_is_read() {
    let config = parse(FULL).unwrap();
    assert_eq!(config.node.as_str(), "hv-01");
    assert_eq!(config.listen.metrics, "[::1]:0".parse().unwrap());
    assert_eq!(config.flags.source, FlagSource::File("/etc/dwcp/flag.json".into()));
    assert_eq!(config.policy.v1, V1Policy::Datacenter);
    assert_eq!(config.policy.datacenter_encryption, Encryption::None);
    assert_eq!(config.limits.memory, Memory(64 << 20));
    assert_eq!(config.hde, Hde { delta: false, ..Hde::default() });
    assert_eq!(config.limits.bandwidth, NonZeroU64::new(25_000_000).map(Rate));
    assert_eq!(config.link.congestion, Congestion::System);
    assert_eq!(config.link.transport, Transport::Quic);
    assert_eq!(config.link.datacenter_rtt, Trip(Duration::from_millis(2)));
    assert_eq!(config.link.datacenter_rate.0.get(), 1_250_000_000);
    assert_eq!(config.limits.node_bandwidth, NonZeroU64::new(100_000_000).map(Rate));
    assert_eq!((config.limits.cpus(), config.limits.workers()), (4, 3));
    assert_eq!(config.vmm.paths.len(), 2);
    assert_eq!(config.flags.return_after, Wait(Duration::from_secs(90)));
    assert_eq!(config.labels.0.get("datacenter").map(String::as_str), Some("dc-1"));
    assert_eq!(config.log.format, LogFormat::Json);
}

#[test]
fn only_the_name_is_required_and_the_defaults_are_the_careful_ones() {
    let config = parse("node = \"hv-01\"").unwrap();
    assert_eq!((&config.flags.source, config.flags.without), (&FlagSource::None, Without::V1));
    assert_eq!(config.flags.return_after, Wait(Duration::from_secs(60)));
    assert_eq!(
        config.policy,
        Policy { v1_plain: false, v1: V1Policy::Any, datacenter_encryption: Encryption::Tls }
    );
    assert_eq!(config.vmm.attach, Attach::None);
    assert!(config.listen.metrics.ip().is_loopback());
}

#[test]
fn an_error_names_file_line_column_and_what_was_expected() {
    assert_eq!(
        error("state_dir", "stat_dir"),
        "/etc/dwcp/dwcpd.toml:3:1: unknown key `stat_dir`, expected one of `node`, `state_dir`, `listen`, `identity`, \
         `flags`, `policy`, `limits`, `hde`, `link`, `vmm`, `labels`, `log`\n  \
         |\n\
         3 | stat_dir = \"/var/lib/dwcp\"\n  \
         | ^^^^^^^^"
    );
    assert_eq!(
        error("64MiB", "64"),
        "/etc/dwcp/dwcpd.toml:31:10: expected a size with its unit, such as 64MiB or 1GB, found \"64\"\n   \
         |\n\
         31 | memory = \"64\"\n   \
         |          ^^^^"
    );
}

#[test]
fn bad_values_are_refused_where_they_stand() {
    // What is replaced, by what, where the error points, and what it says.
    for (from, to, at, expected) in [
        ("\"hv-01\"", "\"a/b\"", "\"a/b\"", "1 to 64 characters"),
        ("\"/var/lib/dwcp\"", "\"lib\"", "\"lib\"", "absolute path"),
        ("\"192.0.2.1:7400\"", "\"192.0.2.1\"", "\"192.0.2.1\"", "socket address"),
        ("\"unix:/run", "\"/run", "\"/run/dwcp/agent", "expected unix: and an absolute path"),
        ("\"file:/etc", "\"file:etc", "\"file:etc", "file:/PATH"),
        ("without = \"v3\"", "without = \"v2\"", "\"v2\"", "unknown value `v2`, expected `v1` or `v3`"),
        ("v1_plain = true", "v1_plain = \"yes\"", "\"yes\"", "expected a boolean"),
        ("\"datacenter\"", "\"lan\"", "\"lan\"", "`any`, `datacenter`, `never`"),
        ("migrations = 2", "migrations = 0", "0\ncpus", "from 1 to 64"),
        ("cpus = 4", "cpus = -1", "-1", "from 1 to 1024"),
        ("cpus = 4", "cpus = 0", "0\nworkers", "from 1 to 1024"),
        ("cpus = 4", "cpus = 1025", "1025", "from 1 to 1024"),
        ("cpus = 4", "cpus = 1.5", "1.5", "a number of CPUs, or a list"),
        ("cpus = 4", "cpus = \"\"", "\"\"", "CPUs from 0 to 1023, such as \"0-1,4\""),
        ("cpus = 4", "cpus = \"0-1024\"", "\"0-1024\"", "CPUs from 0 to 1023"),
        ("cpus = 4", "cpus = \"0,3-1\"", "\"0,3-1\"", "lower CPU of a range first"),
        ("\"200Mbit", "\"0Mbit", "\"0Mbit", "rate above zero"),
        ("\"none\"\noutlive", "\"gdb\"\noutlive", "\"gdb\"", "`none` or `ptrace`"),
        ("\"info,dwcp_link=debug\"", "\"loud\"", "\"loud\"", "expected error, warn, info, debug or trace"),
        ("transport = \"quic\"", "transport = \"udp\"", "\"udp\"", "`auto`, `tcp`, `quic`"),
        ("\"90s\"", "\"0s\"", "\"0s\"", "from 1s to 86400s"),
        ("\"dc-1\"", "\"dc 1\"", "[labels]", "1 to 64 characters"),
        ("[log]", "[logs]", "logs]", "unknown key `logs`"),
        ("[log]", "[log", "\nformat", "expected `]`"),
    ] {
        let error = error(from, to);
        let (first, _) = error.split_once('\n').unwrap_or((&error, ""));
        let place = place(&FULL.replacen(from, to, 1), at);
        assert!(
            first.starts_with(&format!("/etc/dwcp/dwcpd.toml:{place}: ")),
            "{to}, expected at {place}: {error}"
        );
        assert!(first.contains(expected), "{to}: {error}");
    }
    let missing = error("node = \"hv-01\"", "");
    assert!(missing.starts_with("/etc/dwcp/dwcpd.toml: missing key `node`"), "{missing}");
}

/// `line:column` of the first `at` in a text, both from 1.
fn place(text: &str, at: &str) -> String {
    let before = &text[..text.find(at).unwrap_or_else(|| panic!("no {at:?}"))];
    let column = before.len() - before.rfind('\n').map_or(0, |newline| newline + 1);
    format!("{}:{}", before.matches('\n').count() + 1, column + 1)
}

#[test]
fn cpus_are_a_number_or_a_list_and_workers_follow() {
    let limits = |cpus: &str| parse(&format!("node = \"x\"\n[limits]\ncpus = {cpus}")).unwrap().limits;
    for (cpus, count) in [("4", 4), ("1024", 1024), ("\"0-1,4\"", 3), ("\"7\"", 1)] {
        let limits = limits(cpus);
        assert_eq!((limits.cpus(), limits.workers()), (count, count), "{cpus}");
        assert_eq!(matches!(limits.cpus, Some(Cpus::List(_))), cpus.starts_with('"'), "{cpus}");
    }
    let few = parse("node = \"x\"\n[limits]\ncpus = \"0-7\"\nworkers = 2").unwrap().limits;
    assert_eq!((few.cpus(), few.workers()), (8, 2));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load(Path::new("/nonexistent/dwcpd.toml")).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/dwcpd.toml") && error.contains("No such file"), "{error}");
}

#[test]
fn flag_servers_are_read_with_all_their_endpoints() {
    let source = |text: &str| {
        parse(&format!("node = \"x\"\n[flags]\nsource = \"{text}\"")).map(|config| config.flags.source)
    };
    let url = |text| Url::try_from(text).unwrap();
    let (a, b) = (url("http://10.0.0.1:8080"), url("https://b"));
    assert_eq!(source("http://10.0.0.1:8080, https://b"), Ok(FlagSource::Server(vec![a.clone(), b])));
    let ofrep = source("ofrep+http://10.0.0.1:8080").unwrap();
    assert_eq!(ofrep, FlagSource::Ofrep(vec![a]));
    assert_eq!(ofrep.to_string(), "ofrep+http://10.0.0.1:8080");
    for (text, expected) in [
        ("http://a,ofrep+http://b", "either all endpoints"),
        ("http://a,", "expected a URL"),
        ("https://u@a", "token_file"),
        (&["http://a"; 9].join(","), "at most 8"),
        ("ldap://a", "expected a URL"),
        ("a", "expected \"none\""),
    ] {
        let error = source(text).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn odd_places_do_not_break_the_message() {
    for text in
        ["node = \"é\"", "\"é\" = 1\nnode = 7", "x", "\u{7f}", "node = \"hv\"\n[limits]\nmemory = '''a\nb'''"]
    {
        let error = parse(text).unwrap_err();
        assert!(error.starts_with("/etc/dwcp/dwcpd.toml:"), "{error}");
    }
}

/// The file that the package installs. Its defaults are commented out as `#key = value`.
const PACKAGED: &str = include_str!("../../../../systemd/dwcpd.toml");

#[test]
fn what_the_packaged_file_comments_out_is_the_default() {
    let uncommented: Vec<&str> = PACKAGED
        .lines()
        .map(|line| {
            line.strip_prefix('#').filter(|line| line.starts_with(char::is_alphabetic)).unwrap_or(line)
        })
        .collect();
    let uncommented = uncommented.join("\n");
    let mut all = parse(&uncommented).unwrap();
    assert!(all.limits.cpus.is_some() && all.limits.workers.is_some() && all.limits.bandwidth.is_some());
    assert!(all.limits.agent_memory.is_some() && all.limits.cpu_pressure.is_some());
    assert!(all.limits.node_bandwidth.is_some() && all.vmm.sockets.is_some());
    assert!(all.flags.server_key.is_some() && all.flags.token_file.is_some() && !all.labels.0.is_empty());
    // These have examples, since their default is no value.
    (all.limits.cpus, all.limits.workers, all.limits.bandwidth) = (None, None, None);
    (all.limits.agent_memory, all.limits.cpu_pressure, all.limits.node_bandwidth) = (None, None, None);
    (all.flags.server_key, all.flags.token_file, all.labels) = (None, None, Labels::default());
    all.vmm.sockets = None;
    assert_eq!(all, parse(PACKAGED).unwrap());

    // And no key is left out.
    let keys = |text: &str| -> Vec<String> {
        let table: toml::Table = text.parse().unwrap();
        let of = |(name, value): (&String, &toml::Value)| match value.as_table() {
            Some(table) => table.keys().map(|key| format!("{name}.{key}")).collect(),
            None => vec![name.clone()],
        };
        let mut keys: Vec<String> = table.iter().flat_map(of).collect();
        keys.sort();
        keys
    };
    assert_eq!(keys(&uncommented), keys(FULL));
}
