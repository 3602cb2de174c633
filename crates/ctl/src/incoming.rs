//! `dwcpctl incoming`: the destination gets ready.

use dwcp_rpc::v1;

use crate::args::IncomingArgs;
use crate::client::{Client, QUICK, SLOW, within};
use crate::error::{CtlError, Exit, one_line};
use crate::json;

/// Has the agent prepare, and says how to go on at the source.
pub(crate) async fn run(mut client: Client, args: IncomingArgs) -> Result<Exit, CtlError> {
    let request = v1::PrepareIncomingRequest {
        vm: args.vm.to_string(),
        vmm: args.vmm.request(),
        from: args.from.to_string(),
        on_abort: v1::Leave::from(args.on_abort).into(),
        memory_file: args.vmm.memory_file(),
        retry: args.retry,
    };
    let status = client.prepare_incoming(within(SLOW, request)).await?.into_inner();
    if args.json {
        json::print(&json::status(&status));
        return Ok(Exit::Done);
    }
    let here = client.node(within(QUICK, v1::NodeRequest {})).await?.into_inner();
    println!("{} is ready to receive {} from {}", here.node, one_line(&status.vm), one_line(&status.peer));
    println!(
        "at {}: dwcpctl migrate {} --qmp PATH --to {}={}",
        args.from,
        args.vm,
        here.node,
        reachable(&here.data_address)
    );
    Ok(Exit::Done)
}

/// The data address as the source would write it: a wildcard is no address to dial.
fn reachable(address: &str) -> String {
    match address.parse::<std::net::SocketAddr>() {
        Ok(bound) if bound.ip().is_unspecified() => format!("IP:{}", bound.port()),
        _ => one_line(address),
    }
}
